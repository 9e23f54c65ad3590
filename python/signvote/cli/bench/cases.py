"""What is measured: for each op its data, its contenders and how their results are checked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from signvote import ops
from signvote.cli.bench import expected, peers
from signvote.cli.bench.expected import Words, check_equal
from signvote.cli.bench.measure import Contender
from signvote.cli.bench.places import Cuda, Host, Place
from signvote.ddp.layout import BucketLayout, MessageLayout

DTYPES = ("float32", "float64", "float16", "bfloat16")
ROWS = (2, 3, 4, 5, 7, 8, 15, 16, 31, 32, 63, 64, 256)
TERNARY_ROWS = (2, 3, 4, 8, 16, 64)
SHARDS = 8  # workers of the codec of a sharded vote
SEED = 7
SCALE = 0.5
THRESHOLD = 0.5  # which about 38% of the normal variates are not above
QUORUM = 2
BETA = 0.9
# Peers that would unpack more bits than this are left out: they take seconds, and gigabytes.
MOST_PEER_BITS = 1 << 27
CACHE_LINE = 64
GRADIENT_PERIOD = 1_000_003
BLOCK = 1 << 16  # random numbers at a time, so that they stay in the cache


@dataclass(frozen=True)
class Case:
    """One op on one size of data."""

    op: str
    megabytes: float  # of as many float32 coordinates
    dtype: str = "float32"
    zeros: str = "none"  # or "third": a third of the coordinates
    rows: int | None = None

    @property
    def numel(self) -> int:
        """Whole words, because the peers can do no other."""
        return 32 * max(1, round(self.megabytes * 1e6 / 4 / 32))

    def label(self) -> str:
        what = f"M={self.rows}" if self.rows else self.dtype
        zeros = ", a third zeros" if self.zeros == "third" else ""
        return f"{self.op} {what} {self.megabytes:g} MB{zeros}"


def aligned(numel: int, dtype: Any) -> NDArray[Any]:
    """New memory that is there: every page has been written to.

    As torch allocates it, for it is torch's memory that the hook works on: it begins with a cache line, and NumPy would
    ask for huge pages where torch does not.
    """
    memory = torch.zeros(numel * np.dtype(dtype).itemsize, dtype=torch.uint8)
    if memory.data_ptr() % CACHE_LINE:
        raise RuntimeError(f"torch: expected memory at a multiple of {CACHE_LINE} bytes, got {memory.data_ptr():#x}")
    return memory.numpy().view(dtype)


class Data:
    """Random gradients and words, of which the last are kept: cases in a row share them."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._gradient: tuple[Any, NDArray[Any]] | None = None
        self._rows: tuple[Any, NDArray[np.uint32]] | None = None

    def gradient(self, dtype: str, numel: int, zeros: str = "none") -> NDArray[Any]:
        """Normal variates; bfloat16 as its bits."""
        if self._gradient is None or self._gradient[0] != (dtype, numel, zeros):
            self._gradient = None
            self._gradient = (dtype, numel, zeros), self._make_gradient(dtype, numel, zeros)
        return self._gradient[1]

    def _make_gradient(self, dtype: str, numel: int, zeros: str) -> NDArray[Any]:
        """The same normal variates over and over, at a distance that no branch predictor can remember."""
        x = aligned(numel, np.uint16 if dtype == "bfloat16" else dtype)
        normal = self._random.standard_normal(min(numel, GRADIENT_PERIOD), np.float32)
        if zeros == "third":
            normal[self._random.integers(0, 3, normal.size, np.uint8) == 0] = 0
        variates = normal.view(np.uint32) >> 16 if dtype == "bfloat16" else normal
        variates = variates.astype(x.dtype)
        for begin in range(0, numel, variates.size):
            part = x[begin : begin + variates.size]
            part[:] = variates[: part.size]
        return x

    def words(self, numel: int) -> Words:
        return self.rows(1, numel)[0]

    def ballots(self, num_rows: int, numel: int) -> NDArray[np.uint32]:
        """Ternary words of ``num_rows`` workers, each plane beginning with a cache line."""
        rows = self.rows(2 * num_rows, numel)
        stride = rows.strides[0]
        return np.lib.stride_tricks.as_strided(rows, (num_rows, 2, rows.shape[1]), (2 * stride, stride, 4))

    def rows(self, num_rows: int, numel: int) -> NDArray[np.uint32]:
        """``num_rows`` rows of words, each beginning with a cache line."""
        if self._rows is None or self._rows[0] != numel or len(self._rows[1]) < num_rows:
            self._rows = None
            width = numel // 32
            per_line = CACHE_LINE // 4
            stride = (width + per_line - 1) // per_line * per_line
            memory = aligned(num_rows * stride, np.uint32)
            quads = memory.view(np.uint64)
            for begin in range(0, quads.size, BLOCK):
                part = quads[begin : begin + BLOCK]
                part[:] = self._random.bit_generator.random_raw(part.size)
            self._rows = numel, memory.reshape(num_rows, stride)[:, :width]
        return self._rows[1][:num_rows]


@dataclass(frozen=True)
class Options:
    """Who takes part: implementations with their numbers of threads, and peers or not."""

    implementations: Sequence[tuple[str, int]]
    with_peers: bool = True
    device: torch.device | None = None  # a CUDA device, in place of the CPU


def contenders(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    """Those of a case, and how many bytes each of them must move."""
    return _BUILDERS[case.op](case, data, options)


class _Field:
    """Collects the contenders of a case.

    No function of theirs refers to it: nothing would end that cycle while the garbage collector is off.
    """

    def __init__(self, case: Case, options: Options) -> None:
        self.case, self.options = case, options
        self.place: Place = Host() if options.device is None else Cuda(options.device)
        self.contenders: list[Contender] = []

    @property
    def is_on_cpu(self) -> bool:
        return self.options.device is None

    def ops(self, call: Callable[..., object], check: Callable[[str], None]) -> None:
        """``call`` takes the options of an op; ``check`` is handed the label, after the call."""
        for name, threads in self.options.implementations:
            self._add("op", name, threads, self._bind(call, name, threads), check)

    def limit(self, name: str, call: Callable[[int], object]) -> None:
        for threads in sorted({threads for _, threads in self.options.implementations}):
            if not self.is_on_cpu:
                call(threads)  # copies what it works on to the device
            self._add("limit", name, threads, functools.partial(call, threads), None)

    def peer(self, name: str, call: Callable[[], object], check: Callable[[str], None]) -> None:
        if self.options.with_peers and self.case.numel * (self.case.rows or 1) <= MOST_PEER_BITS:
            self._add("peer", name, 1, call, check)

    def numpy(self, call: Callable[[], object], check: Callable[[str], None]) -> None:
        """The peer that works in host memory only."""
        if self.is_on_cpu:
            self.peer("numpy", call, check)

    def done(self, size: int) -> tuple[list[Contender], int]:
        """What a builder returns, for ``size`` bytes."""
        if isinstance(self.place, Cuda):
            copy = self.place.limits.copy_of_size(size)
            self.limit("copy", lambda threads: copy())
        return self.contenders, size

    def _bind(self, call: Callable[..., object], name: str, threads: int) -> Callable[[], object]:
        how = {"implementation": name, "num_threads": threads} if self.is_on_cpu else {}
        return functools.partial(call, **how)

    def _add(
        self, kind: str, name: str, threads: int, call: Callable[[], object], check: Callable[[str], None] | None
    ) -> None:
        label, place = f"{self.case.label()}: {name}, threads {threads}", self.place
        contender = Contender(kind, name, threads, call, seconds=place.seconds)
        if check is not None:
            checked = check

            def call_and_check() -> None:
                place.bring()
                call()
                place.fetch()
                checked(label)

            contender.check = call_and_check
        self.contenders.append(contender)


def _pack_signs(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    x = data.gradient(case.dtype, case.numel, case.zeros)
    out = aligned(case.numel // 32, np.uint32)
    right = expected.pack_signs(x, SEED)
    check = _checker(out, right)
    field = _Field(case, options)
    limits = field.place.limits
    argument, words = field.place.arguments([x], [out])
    field.ops(lambda **how: ops.pack_signs(argument, seed=SEED, out=words, **how), check)
    field.limit("read", lambda threads: limits.read(x, threads))
    if case.zeros == "none":
        tensor, tensor_out = field.place.tensors([x], [out])
        signs = expected.pack_signs(x, None)
        if case.dtype != "bfloat16":
            field.numpy(lambda: peers.numpy_pack(x, out), _checker(out, signs))
        field.peer("torch", lambda: peers.torch_pack(tensor, tensor_out), _checker(out, signs))
        if not field.is_on_cpu and case.dtype != "bfloat16" and peers.find_cupy():
            field.peer("cupy", lambda: peers.cupy_pack(tensor, tensor_out), _checker(out, signs))
    return field.done(x.nbytes)


def _pack_momentum(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    x = data.gradient(case.dtype, case.numel)
    out = aligned(case.numel // 32, np.uint32)
    m = aligned(case.numel, "float64" if case.dtype == "float64" else "float32")

    def start() -> None:
        m[:] = expected.to_float32(x)[::-1]

    start()
    right = expected.momentum(x, m, BETA)
    signs = expected.pack_signs(right, SEED)

    def check(label: str) -> None:
        check_equal(label, m, right)
        check_equal(label, out, signs)
        start()

    field = _Field(case, options)
    limits = field.place.limits
    argument, momentum, words = field.place.arguments([x], [m, out])
    coefficients = (BETA, 1 - BETA, BETA, 1 - BETA)
    field.ops(
        lambda **how: ops.pack_momentum(argument, momentum, coefficients=coefficients, seed=SEED, out=words, **how),
        check,
    )
    # XOR leaves numbers of any kind: it has a momentum of its own.
    kept = aligned(case.numel, m.dtype)
    field.limit("update", lambda threads: limits.update(x, kept, threads))

    def check_roughly(label: str) -> None:
        if not np.allclose(m, right, rtol=1e-3, atol=1e-6):
            raise expected.WrongResultError(f"{label}: the momentum is wrong")
        start()

    scratch = aligned(case.numel, m.dtype)
    gradient, momentum_tensor, tensor_out = field.place.tensors([x], [m, out])

    def torch_peer() -> None:
        peers.torch_pack_momentum(gradient, momentum_tensor, BETA, tensor_out)

    if case.dtype != "bfloat16":
        field.numpy(lambda: peers.numpy_pack_momentum(x, m, BETA, scratch, out), check_roughly)
    field.peer("torch", torch_peer, check_roughly)
    return field.done(x.nbytes + 2 * m.nbytes)


def _unpack_signs(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    words = data.words(case.numel)
    out = aligned(case.numel, np.uint16 if case.dtype == "bfloat16" else case.dtype)

    def check(label: str) -> None:
        expected.check_unpacked(label, out, words, SCALE)
        spoil(out)

    field = _Field(case, options)
    limits = field.place.limits
    argument, target = field.place.arguments([words], [out])
    field.ops(lambda **how: ops.unpack_signs(argument, case.numel, scale=SCALE, out=target, **how), check)
    field.limit("write", lambda threads: limits.write(out, 1, threads))
    if field.is_on_cpu:
        field.limit("repeat", lambda threads: limits.repeat(words, out, threads))
    tensor, tensor_out = field.place.tensors([words], [out])
    if case.dtype != "bfloat16":
        field.numpy(lambda: peers.numpy_unpack(words, SCALE, out), check)
    field.peer("torch", lambda: peers.torch_unpack(tensor, SCALE, tensor_out), check)
    return field.done(out.nbytes)


def _majority_vote(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    assert case.rows is not None
    rows = data.rows(case.rows, case.numel)
    out = aligned(rows.shape[1], np.uint32)
    first: list[Words] = []

    def check(label: str) -> None:
        expected.check_vote(label, out, rows, case.numel, SEED)
        # The check looks at parts of a large vote; the implementations must agree in all of it.
        if not first:
            first.append(out.copy())
        check_equal(label, out, first[0])
        spoil(out)

    field = _Field(case, options)
    limits = field.place.limits
    argument, voted = field.place.arguments([rows], [out])
    field.ops(lambda **how: ops.majority_vote(argument, seed=SEED, numel=case.numel, out=voted, **how), check)
    row_list = list(rows)
    if field.is_on_cpu:
        field.limit("xor_rows", lambda threads: limits.xor_rows(row_list, out, threads))
    many: Any = row_list if field.is_on_cpu else rows
    field.limit("read_rows_then_write", lambda threads: limits.read_rows_then_write(many, out, threads))
    if case.numel * case.rows <= MOST_PEER_BITS and options.with_peers:
        signs = torch.from_numpy((2 * expected.unpack_bits(rows, case.numel) - 1).view(np.int8)).to(field.place.device)
        majority = torch.empty(case.numel, dtype=torch.int16, device=field.place.device)

        def check_numpy(label: str) -> None:
            expected.check_vote(label, out, rows, case.numel, None)

        def check_torch(label: str) -> None:
            expected.check_vote(label, expected.pack_bits((majority > 0).cpu().numpy()), rows, case.numel, None)

        field.numpy(lambda: peers.numpy_vote(row_list, out), check_numpy)
        field.peer("torch", lambda: peers.torch_vote(signs, majority), check_torch)
    return field.done((case.rows + 1) * out.nbytes)


def _pack_ternary(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    x = data.gradient(case.dtype, case.numel)
    out = aligned(2 * (case.numel // 32), np.uint32).reshape(2, -1)
    check = _checker(out, expected.pack_ternary(x, THRESHOLD))
    field = _Field(case, options)
    limits = field.place.limits
    argument, planes = field.place.arguments([x], [out])
    field.ops(lambda **how: ops.pack_ternary(argument, threshold=THRESHOLD, out=planes, **how), check)
    field.limit("read", lambda threads: limits.read(x, threads))
    if case.dtype != "bfloat16":
        field.numpy(lambda: peers.numpy_pack_ternary(x, THRESHOLD, out), check)
    if not field.is_on_cpu:
        tensor, tensor_out = field.place.tensors([x], [out])
        field.peer("torch", lambda: peers.torch_pack_ternary(tensor, THRESHOLD, tensor_out), check)
    return field.done(x.nbytes)


def _unpack_ternary(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    planes = data.rows(2, case.numel)
    out = aligned(case.numel, np.uint16 if case.dtype == "bfloat16" else case.dtype)

    def check(label: str) -> None:
        expected.check_unpacked_ternary(label, out, planes, SCALE)
        spoil(out)

    field = _Field(case, options)
    limits = field.place.limits
    argument, target = field.place.arguments([planes], [out])
    field.ops(lambda **how: ops.unpack_ternary(argument, case.numel, scale=SCALE, out=target, **how), check)
    field.limit("write", lambda threads: limits.write(out, 1, threads))
    if case.dtype != "bfloat16":
        field.numpy(lambda: peers.numpy_unpack_ternary(planes, SCALE, out), check)
    if not field.is_on_cpu:
        tensor, tensor_out = field.place.tensors([planes], [out])
        field.peer("torch", lambda: peers.torch_unpack_ternary(tensor, SCALE, tensor_out), check)
    return field.done(out.nbytes)


def _majority_vote_ternary(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    assert case.rows is not None
    stack = data.ballots(case.rows, case.numel)
    out = aligned(2 * stack.shape[2], np.uint32).reshape(2, -1)
    first: list[Words] = []

    def check(label: str) -> None:
        expected.check_vote_ternary(label, out, stack, case.numel, QUORUM)
        # The check looks at parts of a large vote; the implementations must agree in all of it.
        if not first:
            first.append(out.copy())
        check_equal(label, out.reshape(-1), first[0].reshape(-1))
        spoil(out)

    field = _Field(case, options)
    limits = field.place.limits
    argument, voted = field.place.arguments([stack], [out])
    field.ops(
        lambda **how: ops.majority_vote_ternary(argument, quorum=QUORUM, numel=case.numel, out=voted, **how), check
    )
    if field.is_on_cpu:
        rows_of_planes = [list(stack[:, plane]) for plane in range(2)]

        def each_plane(limit: Callable[..., object]) -> Callable[[int], object]:
            def call(threads: int) -> None:
                for rows, plane in zip(rows_of_planes, out, strict=True):
                    limit(rows, plane, threads)

            return call

        field.limit("xor_rows", each_plane(limits.xor_rows))
        field.limit("read_rows_then_write", each_plane(limits.read_rows_then_write))
    else:
        field.limit("read_rows_then_write", lambda threads: limits.read_rows_then_write(stack, out, threads))
    field.numpy(lambda: peers.numpy_vote_ternary(stack, QUORUM, out), check)
    if not field.is_on_cpu and case.numel * case.rows <= MOST_PEER_BITS and options.with_peers:
        votes = torch.from_numpy(expected.unpack_ternary(stack, case.numel)).to(field.place.device)
        lead = torch.empty(case.numel, dtype=torch.int16, device=field.place.device)

        def check_torch(label: str) -> None:
            found = lead.cpu().numpy()
            words = np.stack([expected.pack_bits(found > 0), expected.pack_bits(found != 0)])
            expected.check_vote_ternary(label, words, stack, case.numel, QUORUM)

        field.peer("torch", lambda: peers.torch_vote_ternary(votes, QUORUM, lead), check_torch)
    return field.done((case.rows + 1) * out.nbytes)


def _codec(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    """What one of SHARDS workers computes in a sharded vote: pack all, vote on its share, unpack all."""
    x = data.gradient("float32", case.numel)
    share = -(-case.numel // SHARDS // 64) * 64
    rows = data.rows(SHARDS, share)
    words, vote = aligned(case.numel // 32, np.uint32), aligned(rows.shape[1], np.uint32)
    bucket = aligned(case.numel, np.float32)
    right = expected.pack_signs(x, SEED)

    def check(label: str) -> None:
        check_equal(label, words, right)
        expected.check_vote(label, vote, rows, share, SEED)
        expected.check_unpacked(label, bucket, right, SCALE)
        spoil(words, vote, bucket)

    def codec(**how: Any) -> None:
        ops.pack_signs(x, seed=SEED, out=words, **how)
        ops.majority_vote(rows, seed=SEED, numel=share, out=vote, **how)
        ops.unpack_signs(words, case.numel, scale=SCALE, out=bucket, **how)

    field = _Field(case, options)
    field.ops(codec, check)
    limits = field.place.limits
    field.limit("copy", lambda threads: limits.copy(x, bucket, threads))
    return field.contenders, x.nbytes + bucket.nbytes


def hook_bytes(numel: int) -> int:
    """Of the message that the hook copies to the host for a bucket of ``numel`` coordinates, and of the one back."""
    return MessageLayout(BucketLayout([numel], [0], SHARDS)).new_message().nbytes


def _round_trip(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    """Pack, copy as many bytes to pinned memory as the hook, and back, unpack: all on one stream, in one run."""
    x = data.gradient("float32", case.numel)
    bucket = aligned(case.numel, np.float32)
    right = expected.pack_signs(x, SEED)
    field = _Field(case, options)
    gradient, target = field.place.tensors([x], [bucket])
    pinned = torch.empty(hook_bytes(case.numel) // 4, dtype=torch.int32).pin_memory()
    message = torch.zeros_like(pinned, device=field.place.device)
    words = message[: case.numel // 32]

    def there_and_back() -> None:
        pinned.copy_(message, non_blocking=True)
        message.copy_(pinned, non_blocking=True)

    def round_trip(**how: Any) -> None:
        ops.pack_signs(gradient, seed=SEED, out=words, **how)
        there_and_back()
        ops.unpack_signs(words, case.numel, scale=SCALE, out=target, **how)

    def check(label: str) -> None:
        expected.check_unpacked(label, bucket, right, SCALE)
        spoil(bucket)

    field.ops(round_trip, check)
    field.limit("transfer", lambda threads: there_and_back())
    return field.contenders, x.nbytes + bucket.nbytes + 2 * message.nbytes


def _checker(out: NDArray[Any], right: NDArray[Any]) -> Callable[[str], None]:
    def check(label: str) -> None:
        check_equal(label, out, right)
        spoil(out)

    return check


def spoil(*outs: NDArray[Any]) -> None:
    """So that the next one cannot pass with this one's results."""
    for out in outs:
        out.view(np.uint8).fill(0xAA)


_BUILDERS: dict[str, Callable[[Case, Data, Options], tuple[list[Contender], int]]] = {
    "pack_signs": _pack_signs,
    "pack_momentum": _pack_momentum,
    "unpack_signs": _unpack_signs,
    "majority_vote": _majority_vote,
    "pack_ternary": _pack_ternary,
    "unpack_ternary": _unpack_ternary,
    "majority_vote_ternary": _majority_vote_ternary,
    "codec": _codec,
    "round_trip": _round_trip,
}
OPS = tuple(_BUILDERS)
