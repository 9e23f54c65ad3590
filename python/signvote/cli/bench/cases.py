"""What is measured: for each op its data, its contenders and how their results are checked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from signvote import _limits, ops
from signvote.cli.bench import expected, peers
from signvote.cli.bench.expected import Words, check_equal
from signvote.cli.bench.measure import Contender

DTYPES = ("float32", "float64", "float16", "bfloat16")
ROWS = (2, 3, 4, 5, 7, 8, 15, 16, 31, 32, 63, 64, 256)
SHARDS = 8  # workers of the codec of a sharded vote
SEED = 7
SCALE = 0.5
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


def as_argument(x: NDArray[Any]) -> Any:
    """As the ops take it: bits of bfloat16 and words that go with them as tensors, all else as it is."""
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == np.uint16 else x


def words_like(x: NDArray[Any], words: Words) -> Any:
    return as_tensor(words) if x.dtype == np.uint16 else words


def as_tensor(x: NDArray[Any]) -> torch.Tensor:
    """The same memory: words as int32, bits of bfloat16 as bfloat16."""
    if x.dtype == np.uint32:
        return torch.from_numpy(x.view(np.int32))
    argument = as_argument(x)
    return argument if isinstance(argument, torch.Tensor) else torch.from_numpy(argument)


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


def contenders(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    """Those of a case, and how many bytes each of them must move."""
    return _BUILDERS[case.op](case, data, options)


class _Field:
    """Collects the contenders of a case."""

    def __init__(self, case: Case, options: Options) -> None:
        self.case, self.options = case, options
        self.contenders: list[Contender] = []

    def ops(self, call: Callable[..., object], check: Callable[[str], None]) -> None:
        """``call`` takes the options of an op; ``check`` is handed the label, after the call."""
        for name, threads in self.options.implementations:
            self._add("op", name, threads, self._bind(call, name, threads), check)

    def limit(self, name: str, call: Callable[[int], object]) -> None:
        for threads in sorted({threads for _, threads in self.options.implementations}):
            self._add("limit", name, threads, functools.partial(call, threads), None)

    def peer(self, name: str, call: Callable[[], object], check: Callable[[str], None]) -> None:
        if self.options.with_peers and self.case.numel * (self.case.rows or 1) <= MOST_PEER_BITS:
            self._add("peer", name, 1, call, check)

    @staticmethod
    def _bind(call: Callable[..., object], name: str, threads: int) -> Callable[[], object]:
        return lambda: call(implementation=name, num_threads=threads)

    def _add(
        self, kind: str, name: str, threads: int, call: Callable[[], object], check: Callable[[str], None] | None
    ) -> None:
        label = f"{self.case.label()}: {name}, threads {threads}"
        contender = Contender(kind, name, threads, call)
        if check is not None:
            checked = check

            def call_and_check() -> None:
                call()
                checked(label)

            contender.check = call_and_check
        self.contenders.append(contender)


def _pack_signs(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    x = data.gradient(case.dtype, case.numel, case.zeros)
    out = aligned(case.numel // 32, np.uint32)
    right = expected.pack_signs(x, SEED)
    check = _checker(out, right)
    argument, words = as_argument(x), words_like(x, out)
    field = _Field(case, options)
    field.ops(lambda **how: ops.pack_signs(argument, seed=SEED, out=words, **how), check)
    field.limit("read", lambda threads: _limits.read(x, threads))
    if case.zeros == "none":
        tensor, tensor_out = as_tensor(x), as_tensor(out)
        signs = expected.pack_signs(x, None)
        if case.dtype != "bfloat16":
            field.peer("numpy", lambda: peers.numpy_pack(x, out), _checker(out, signs))
        field.peer("torch", lambda: peers.torch_pack(tensor, tensor_out), _checker(out, signs))
    return field.contenders, x.nbytes


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

    argument, words = as_argument(x), words_like(x, out)
    momentum = torch.from_numpy(m) if isinstance(argument, torch.Tensor) else m
    coefficients = (BETA, 1 - BETA, BETA, 1 - BETA)
    field = _Field(case, options)
    field.ops(
        lambda **how: ops.pack_momentum(argument, momentum, coefficients=coefficients, seed=SEED, out=words, **how),
        check,
    )
    # XOR leaves numbers of any kind: it has a momentum of its own.
    kept = aligned(case.numel, m.dtype)
    field.limit("update", lambda threads: _limits.update(x, kept, threads))

    def check_roughly(label: str) -> None:
        if not np.allclose(m, right, rtol=1e-3, atol=1e-6):
            raise expected.WrongResultError(f"{label}: the momentum is wrong")
        start()

    scratch = aligned(case.numel, m.dtype)
    gradient, momentum_tensor, tensor_out = as_tensor(x), torch.from_numpy(m), as_tensor(out)

    def torch_peer() -> None:
        peers.torch_pack_momentum(gradient, momentum_tensor, BETA, tensor_out)

    if case.dtype != "bfloat16":
        field.peer("numpy", lambda: peers.numpy_pack_momentum(x, m, BETA, scratch, out), check_roughly)
    field.peer("torch", torch_peer, check_roughly)
    return field.contenders, x.nbytes + 2 * m.nbytes


def _unpack_signs(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    words = data.words(case.numel)
    out = aligned(case.numel, np.uint16 if case.dtype == "bfloat16" else case.dtype)

    def check(label: str) -> None:
        expected.check_unpacked(label, out, words, SCALE)
        spoil(out)

    argument, target = words_like(out, words), as_argument(out)
    field = _Field(case, options)
    field.ops(lambda **how: ops.unpack_signs(argument, case.numel, scale=SCALE, out=target, **how), check)
    field.limit("write", lambda threads: _limits.write(out, 1, threads))
    field.limit("repeat", lambda threads: _limits.repeat(words, out, threads))
    tensor, tensor_out = as_tensor(words), as_tensor(out)
    if case.dtype != "bfloat16":
        field.peer("numpy", lambda: peers.numpy_unpack(words, SCALE, out), check)
    field.peer("torch", lambda: peers.torch_unpack(tensor, SCALE, tensor_out), check)
    return field.contenders, out.nbytes


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
    field.ops(lambda **how: ops.majority_vote(rows, seed=SEED, numel=case.numel, out=out, **how), check)
    row_list = list(rows)
    field.limit("xor_rows", lambda threads: _limits.xor_rows(row_list, out, threads))
    field.limit("read_rows_then_write", lambda threads: _limits.read_rows_then_write(row_list, out, threads))
    if case.numel * case.rows <= MOST_PEER_BITS and options.with_peers:
        signs = torch.from_numpy((2 * expected.unpack_bits(rows, case.numel) - 1).view(np.int8))
        majority = torch.empty(case.numel, dtype=torch.int16)

        def check_numpy(label: str) -> None:
            expected.check_vote(label, out, rows, case.numel, None)

        def check_torch(label: str) -> None:
            expected.check_vote(label, expected.pack_bits((majority > 0).numpy()), rows, case.numel, None)

        field.peer("numpy", lambda: peers.numpy_vote(row_list, out), check_numpy)
        field.peer("torch", lambda: peers.torch_vote(signs, majority), check_torch)
    return field.contenders, (case.rows + 1) * out.nbytes


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
    field.limit("copy", lambda threads: _limits.copy(x, bucket, threads))
    return field.contenders, x.nbytes + bucket.nbytes


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
    "codec": _codec,
}
OPS = tuple(_BUILDERS)
