"""The ops on CUDA tensors, bits equal to the reference: on a CUDA device, and on the stand-in for one.

The stand-in (see ``test_cuda_on_cpu``) is ``_cuda`` built by the host compiler: its device memory is memory, so its
tensors are on the CPU. All of ``signvote.cuda`` but the choice of device and stream runs as on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import mmap
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode

import reference
import signvote
from samples import BITS, DTYPES, SIZES, STORED, bit_rows, mixture, special, store, values, without_memory, word_rows
from signvote import arguments, cuda, cuda_runs, ops
from signvote.ddp.codec import CudaCodec, Streams
from signvote.ddp.layout import TRAILER_WORDS, BucketLayout
from signvote.ddp.stats import Counters
from signvote.ddp.topology import Sharded
from test_cuda_on_cpu import CUDA, STAND_IN, TILE, TILED_SIZES, VOTE_PIECE, build_objects, need_stand_in

SEED = 2**63 + 12345
UNDECIDED = ("coin", "positive", "negative")
LION = (0.9, 0.1, 0.99, 0.01)
SIGNUM = (0.9, 1 - 0.9, 0.9, 1 - 0.9)

# What has no NumPy dtype in torch crosses as integers.
AS_TENSOR: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

pytestmark = pytest.mark.timeout(600)  # compilers, on a machine that may be busy
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``_cuda`` on the CPU."""
    need_stand_in()
    pybind11 = pytest.importorskip("pybind11")
    directory = tmp_path_factory.mktemp("cuda_on_cpu")
    # An access of a vector at an address that is no multiple of its size kills the process; on a GPU it fails as well.
    flags = ["-O1", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", "-fPIC", "-fvisibility=hidden"]
    flags += ['-DSIGNVOTE_CUDA_ARCHITECTURES="none"', "-I", str(CUDA.parent)]
    flags += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    sources = [CUDA.parent / "bindings" / "cuda.cpp", *CUDA.glob("*.cu"), STAND_IN / "cuda_on_cpu.cpp"]
    built = directory / "_cuda.so"
    subprocess.run(["g++", "-shared", *build_objects(sources, flags, directory), "-o", str(built)], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cuda":
        return torch.device("cuda", 0)

    @contextmanager
    def current(device: torch.device) -> Iterator[tuple[int, Any]]:
        yield 0, SimpleNamespace(cuda_stream=0)

    module = request.getfixturevalue("stand_in")
    monkeypatch.setattr(cuda, "find_module", lambda: module)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # what signvote goes by, in Python and in _cuda
    monkeypatch.setattr(cuda, "_current", current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return torch.device("cpu")


def to_tensor(array: NDArray[Any], device: torch.device, dtype: str | None = None, offset: int = 0) -> torch.Tensor:
    """On the device, ``offset`` items after where memory is aligned."""
    kind = array.dtype if dtype is None else np.dtype(BITS[dtype])
    integers = torch.from_numpy(array.view(kind.str.replace("u", "i")).copy().reshape(-1))
    memory = torch.zeros(array.size + offset, dtype=integers.dtype, device=device)
    memory[offset:] = integers.to(device)
    return memory[offset:] if dtype is None else memory[offset:].view(AS_TENSOR[dtype])


def to_numpy(x: torch.Tensor) -> Any:
    """Its bits."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    array = x.detach().view(integers).cpu().numpy()
    return array.view(array.dtype.str.replace("i", "u"))


def same_floats(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Equal to the last bit, all NaNs alike; ``a`` are the bits."""
    return bool(np.all((a == b.view(a.dtype)) | (np.isnan(a.view(b.dtype)) & np.isnan(b))))


@pytest.mark.parametrize("numel", [*SIZES[::3], *TILED_SIZES])
@each_dtype
def test_pack_signs(device: torch.device, dtype: str, numel: int) -> None:
    stored = mixture(np.random.default_rng(numel), numel, dtype)
    for zeros, offset in zip(UNDECIDED, (0, 1, 8), strict=True):
        expected, _, nonfinite = reference.pack_signs(values(stored, dtype), zeros, SEED)
        x = to_tensor(stored, device, dtype, offset)
        assert np.array_equal(to_numpy(signvote.pack_signs(x, zeros=zeros, seed=SEED)), expected)
        assert signvote.has_nonfinite(x) == (nonfinite > 0)
        assert np.array_equal(to_numpy(x), stored.view(BITS[dtype]))


@each_dtype
def test_special_values(device: torch.device, dtype: str) -> None:
    stored: NDArray[Any] = np.concatenate([np.roll(special(dtype), shift) for shift in range(len(special(dtype)))])
    expected, *_ = reference.pack_signs(values(stored, dtype), "coin", 7)
    assert np.array_equal(to_numpy(signvote.pack_signs(to_tensor(stored, device, dtype), seed=7)), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_pattern(device: torch.device, dtype: str) -> None:
    stored: NDArray[Any] = np.arange(2**16, dtype=np.uint16).view(STORED[dtype])
    x = to_tensor(stored, device, dtype)
    expected, *_ = reference.pack_signs(values(stored, dtype), "coin", SEED)
    assert np.array_equal(to_numpy(signvote.pack_signs(x, seed=SEED)), expected)
    start = np.random.default_rng(0).standard_normal(2**16).astype(np.float32) * np.float32(1e-4)
    momentum = to_tensor(start, device).view(torch.float32)
    expected, kept, *_ = reference.pack_momentum(values(stored, dtype), start, SIGNUM, "coin", SEED)
    words = ops.pack_momentum(x, momentum, coefficients=SIGNUM, seed=SEED)
    assert np.array_equal(to_numpy(words), expected)
    assert same_floats(to_numpy(momentum), kept)


@pytest.mark.parametrize(("offset", "momentum_offset"), [(0, 1), (0, 2), (1, 0), (2, 0), (3, 4)])
@each_dtype
def test_pack_momentum_of_memory_aligned_on_one_side(
    device: torch.device, dtype: str, offset: int, momentum_offset: int
) -> None:
    rng = np.random.default_rng(offset)
    numel = 2 * TILE + 5
    stored = mixture(rng, numel, dtype)
    start = mixture(rng, numel, "float64" if dtype == "float64" else "float32", finite=True)
    expected, kept, *_ = reference.pack_momentum(values(stored, dtype), start, LION, "coin", SEED)
    momentum = to_tensor(start, device, str(start.dtype), momentum_offset)
    words = ops.pack_momentum(to_tensor(stored, device, dtype, offset), momentum, coefficients=LION, seed=SEED)
    assert np.array_equal(to_numpy(words), expected)
    assert same_floats(to_numpy(momentum), kept)


@pytest.mark.parametrize("numel", [0, 1, 33, 1023, *TILED_SIZES])
@each_dtype
def test_pack_momentum(device: torch.device, dtype: str, numel: int) -> None:
    rng = np.random.default_rng(numel)
    stored = mixture(rng, numel, dtype)
    start = mixture(rng, numel, "float64" if dtype == "float64" else "float32", finite=True)
    # Sums that cancel, some of them to the last bit.
    cancelling = rng.integers(0, 4, numel) == 0
    start[cancelling] = -values(stored, dtype)[cancelling]
    start[~np.isfinite(start)] = 1
    for coefficients, offset in ((SIGNUM, 0), (LION, 1), ((-1.0, 1.0, 1.0, -1.0), 4), ((1e30, 1e30, 1e-30, 1e-30), 2)):
        expected, kept, *_ = reference.pack_momentum(values(stored, dtype), start, coefficients, "coin", SEED)
        momentum = to_tensor(start, device, str(start.dtype), offset)
        x = to_tensor(stored, device, dtype, offset)
        words = ops.pack_momentum(x, momentum, coefficients=coefficients, seed=SEED)
        assert np.array_equal(to_numpy(words), expected)
        assert same_floats(to_numpy(momentum), kept)


@pytest.mark.parametrize("num_rows", [*range(1, 18), 31, 32, 255, 256, 1001])
def test_majority_vote(device: torch.device, num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    for numel in (0, 1, 33, 65, 2 * VOTE_PIECE) if num_rows < 20 else (65,):
        for bits, ties in zip(bit_rows(rng, num_rows, numel), ("coin", "negative"), strict=True):
            rows = word_rows(bits, unused=True)
            expected, _ = reference.majority_vote(rows, numel, ties, SEED)
            stack = to_tensor(rows, device).view(rows.shape)
            votes = signvote.majority_vote(stack, ties=ties, seed=SEED, numel=numel)
            assert np.array_equal(to_numpy(votes), expected)


@pytest.mark.parametrize(
    ("shift", "out_shift", "gap"), [(0, 0, 0), (1, 0, 0), (0, 3, 0), (0, 0, 1), (2, 2, 4), (0, 0, 4)]
)
def test_majority_vote_at_any_address(device: torch.device, shift: int, out_shift: int, gap: int) -> None:
    """Rows of whole pieces, that begin, or lie apart, or are written, at multiples of 16 bytes or elsewhere."""
    numel = 2 * VOTE_PIECE + 100
    width = (numel + 31) // 32 // 4 * 4 + 4 + gap
    memory = np.random.default_rng(shift).integers(0, 2**32, 6 * width + shift, dtype=np.uint32)
    rows = memory[shift:].reshape(6, width)[:, : (numel + 31) // 32]
    expected, _ = reference.majority_vote(rows, numel, "coin", SEED)
    stack = to_tensor(memory, device)[shift:].view(6, width)[:, : rows.shape[1]]
    out = torch.full((rows.shape[1] + out_shift + 1,), 7, dtype=torch.int32, device=device)
    written = out[out_shift:-1]
    assert signvote.majority_vote(stack, seed=SEED, numel=numel, out=written) is written
    assert np.array_equal(to_numpy(written), expected)
    assert (out[:out_shift] == 7).all()
    assert out[-1] == 7


def test_majority_vote_of_the_most_rows(device: torch.device) -> None:
    for num_rows in (65534, 65535):
        bits = next(bit_rows(np.random.default_rng(num_rows), num_rows, 67))
        bits[:, 0] = np.arange(num_rows) < num_rows // 2
        rows = word_rows(bits, unused=True)
        expected, _ = reference.majority_vote(rows, 67, "coin", SEED)
        stack = to_tensor(rows, device).view(rows.shape)
        assert np.array_equal(to_numpy(signvote.majority_vote(stack, seed=SEED, numel=67)), expected)
    with pytest.raises(ValueError, match=r"^majority_vote: stack has 65536 rows, expected 1 to 65535$"):
        signvote.majority_vote(torch.zeros(65536, 1, dtype=torch.int32, device=device))


def test_majority_vote_of_strided_rows_and_of_lists(device: torch.device) -> None:
    wide = np.random.default_rng(3).integers(0, 2**32, (6, 13), dtype=np.uint32)
    on_device = to_tensor(wide, device).view(6, 13)
    for rows, columns in ((slice(None), slice(2, 9)), (slice(None, None, 2), slice(7)), (slice(1), slice(1, 8))):
        expected, _ = reference.majority_vote(wide[rows, columns], 220, "coin", 1)
        stack: Any = on_device[rows, columns]
        assert np.array_equal(to_numpy(signvote.majority_vote(stack, numel=220, seed=1)), expected)
        listed: list[torch.Tensor] = list(stack)
        assert np.array_equal(to_numpy(signvote.majority_vote(listed, numel=220, seed=1)), expected)
    expanded = on_device[:1, 3:10].expand(4, 7)
    assert np.array_equal(to_numpy(signvote.majority_vote(expanded)), wide[0, 3:10])
    # Between the rows there is room for the result.
    out = on_device[2, 9:]
    expected, _ = reference.majority_vote(wide[:, :4], 128, "coin", 1)
    assert signvote.majority_vote(on_device[:, :4], numel=128, seed=1, out=out) is out
    assert np.array_equal(to_numpy(out), expected)


@pytest.mark.parametrize("numel", [*SIZES[::3], *TILED_SIZES])
@each_dtype
def test_unpack_signs(device: torch.device, dtype: str, numel: int) -> None:
    words = np.random.default_rng(numel).integers(0, 2**32, (numel + 31) // 32, dtype=np.uint32)
    ones = reference.bits_of(words, numel)
    for scale, offset in ((1.0, 0), (-0.3, 1), (0.0, 8)):
        memory = torch.full((numel + offset + 9,), 7.0, dtype=AS_TENSOR[dtype], device=device)
        out = memory[offset : offset + numel]
        assert signvote.unpack_signs(to_tensor(words, device), numel, scale=scale, out=out) is out
        value = torch.tensor(scale, dtype=AS_TENSOR[dtype])
        expected = torch.where(torch.from_numpy(ones), value, -value)
        assert np.array_equal(to_numpy(out), to_numpy(expected))
        assert (memory[:offset] == 7).all()
        assert (memory[offset + numel :] == 7).all()
        assert signvote.unpack_signs(to_tensor(words, device), numel, dtype=AS_TENSOR[dtype]).shape == (numel,)


def runs_of(numels: list[int], rng: np.random.Generator) -> tuple[NDArray[np.int64], int, int]:
    """Runs in a random order of places, with gaps, and how many coordinates and words there are."""
    runs, coordinate, word = [], 3, 2
    for place, numel in zip(rng.permutation(len(numels)), numels, strict=True):
        runs.append((int(place), 64 * int(rng.integers(0, 5)), numel, coordinate, word))
        coordinate += numel + int(rng.integers(0, 3))
        word += (numel + 63) // 64 * 2 + 2 * int(rng.integers(0, 2))
    return np.array(runs, np.int64).reshape(-1, 5), coordinate + 5, word + 4


@pytest.mark.parametrize("numels", [[], [1], [64, 0, 65, 63], [5000, 1, 1024, 1024, 3000, 9000]], ids=len)
@each_dtype
def test_runs(device: torch.device, dtype: str, numels: list[int]) -> None:
    rng = np.random.default_rng(0)
    runs, num_coordinates, num_words = runs_of(numels, rng)
    on_device = cuda_runs.DeviceRuns.of(runs, num_coordinates, num_words, device)
    stored = mixture(rng, num_coordinates, dtype)
    start = mixture(rng, num_coordinates, "float64" if dtype == "float64" else "float32", finite=True)
    rows = rng.integers(0, 2**32, (4, num_words), dtype=np.uint32)
    counts = torch.full((2,), -1, dtype=torch.int64, device=device)
    for momentum in (None, start.copy()):
        expected = rows[0].copy()
        out = to_tensor(expected, device)
        kept = None if momentum is None else to_tensor(momentum, device, str(momentum.dtype))
        cuda_runs.pack_runs(
            to_tensor(stored, device, dtype), kept, LION, on_device, out, counts, zeros="coin", seed=SEED
        )
        found = reference.pack_runs(values(stored, dtype), momentum, LION, runs, expected, "coin", SEED)
        assert np.array_equal(to_numpy(out), expected)
        assert tuple(counts.tolist()) == found
        if momentum is not None and kept is not None:
            assert same_floats(to_numpy(kept), momentum)

    expected = rows[0].copy()
    out, tied = to_tensor(expected, device), torch.full((1,), -1, dtype=torch.int64, device=device)
    cuda_runs.vote_runs(to_tensor(rows, device).view(rows.shape), on_device, out, tied, ties="coin", seed=SEED)
    assert reference.vote_runs(list(rows), runs, expected, "coin", SEED) == tied.item()
    assert np.array_equal(to_numpy(out), expected)

    bucket = to_tensor(stored, device, dtype)
    cuda_runs.unpack_runs(to_tensor(rows[0], device), on_device, bucket, scale=0.5)
    scale: NDArray[Any] = store(np.array([0.5, -0.5]), dtype).view(BITS[dtype])
    unpacked = stored.view(BITS[dtype]).copy()
    for _, _, numel, coordinate, word in runs.tolist():
        ones = reference.bits_of(rows[0][word:], numel)
        unpacked[coordinate : coordinate + numel] = np.where(ones, *scale)
    assert np.array_equal(to_numpy(bucket), unpacked)


class AtOnce:
    """A stream or an event of the stand-in, which has done everything when a call returns."""

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def record(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, event: object) -> float:
        return 1.0


@each_dtype
def test_codec_of_the_hook(device: torch.device, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        for name in ("Stream", "Event"):
            monkeypatch.setattr(torch.cuda, name, AtOnce)
        monkeypatch.setattr(torch.cuda, "current_stream", AtOnce)
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    rng = np.random.default_rng(0)
    layout = BucketLayout([5000, 1, 70], [2, 0, 1], 3, TRAILER_WORDS)
    stored = mixture(rng, layout.numel, dtype)
    start = mixture(rng, layout.numel, "float64" if dtype == "float64" else "float32", finite=True)
    bucket, momentum = to_tensor(stored, device, dtype), to_tensor(start, device, str(start.dtype))
    exchange, counters = Sharded(layout, 0, 3), Counters()
    codec = CudaCodec(bucket, layout.runs, exchange, counters, Streams.of(device))
    for step in range(2):
        expected: NDArray[np.uint32] = np.zeros(exchange.sent.numel(), np.uint32)
        before = bucket.to("cpu", copy=True).double().numpy()
        found = reference.pack_runs(before.astype(start.dtype), start, LION, layout.runs, expected, "coin", step)
        codec.pack(bucket, momentum, LION, zeros="coin", seed=step, is_last=True)
        assert codec.packed() == found
        assert np.array_equal(to_numpy(exchange.sent).reshape(-1), expected)
        assert same_floats(to_numpy(momentum), start)

        words = rng.integers(0, 2**32, exchange.result.numel(), dtype=np.uint32)
        exchange.result.view(-1).copy_(torch.from_numpy(words.view(np.int32)))
        codec.unpack(bucket, scale=0.5)
        codec.hand_over()
        unpacked: NDArray[Any] = np.concatenate(
            [reference.bits_of(words[word:], numel) for _, _, numel, _, word in layout.runs.tolist()]
        )
        assert np.array_equal(bucket.double().cpu().numpy(), np.where(unpacked, 0.5, -0.5))
    assert counters.pack_seconds > 0
    assert counters.unpack_seconds > 0
    codec.fill(bucket, torch.nan)
    codec.hand_over()
    assert bucket.isnan().all()


def test_cut_runs() -> None:
    runs = np.array([[7, 64, 2500, 10, 4], [3, 0, 0, 0, 0], [2, 0, 1024, 5000, 100]])
    expected = [[7, 64, 1024, 10, 4], [7, 1088, 1024, 1034, 36], [7, 2112, 452, 2058, 68], [2, 0, 1024, 5000, 100]]
    assert cuda_runs.cut_runs(runs, 1024).tolist() == expected


def test_memory_of_runs_is_kept_until_the_stream_has_used_it(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[int] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(tensor.data_ptr()))
    runs = cuda_runs.DeviceRuns.of(np.array([[0, 0, 64, 0, 0]]), 64, 2, device)
    bucket, words = torch.ones(64, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    cuda_runs.pack_runs(bucket, None, LION, runs, words, counts, zeros="coin", seed=0)
    cuda_runs.pack_runs(bucket, torch.zeros_like(bucket), LION, runs, words, counts, zeros="coin", seed=0)
    cuda_runs.vote_runs(words[None].clone(), runs, words, counts[:1], ties="coin", seed=0)
    cuda_runs.unpack_runs(words, runs, bucket)
    pieces, vote_pieces = runs.pieces.data_ptr(), runs.vote_pieces.data_ptr()
    assert recorded == [pieces, pieces, vote_pieces, pieces]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((-1, 0, 64, 0, 0), "DeviceRuns.of: runs has place -1 in row 0, expected 0 or more"),
        ((0, 32, 64, 0, 0), "DeviceRuns.of: runs has first 32 in row 0, expected a multiple of 64"),
        ((0, 0, -1, 0, 0), "DeviceRuns.of: runs has numel -1 in row 0, expected 0 or more"),
        (
            (0, 0, 64, 37, 0),
            "DeviceRuns.of: runs has coordinate 37 and numel 64 in row 0, expected a range within 100 c",
        ),
        ((0, 0, 64, 0, 3), "DeviceRuns.of: runs has word 3 and numel 64 in row 0, expected a range within 4 words"),
    ],
)
def test_runs_are_checked_as_on_the_cpu(device: torch.device, row: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        cuda_runs.DeviceRuns.of(np.array([row]), 100, 4, device)
    runs = cuda_runs.DeviceRuns.of(np.array([[0, 0, 100, 0, 0]]), 100, 4, device)
    words = torch.zeros(3, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"^unpack_runs: runs has word 0 and numel 100 in row 0, expected a range"):
        cuda_runs.unpack_runs(words, runs, torch.ones(100, device=device))
    tensor = torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(TypeError, match=r"^vote_runs: counts is torch.int32, expected int64$"):
        cuda_runs.vote_runs(words.new_zeros(1, 4), runs, words.new_zeros(4), tensor, ties="coin", seed=0)
    with pytest.raises(ValueError, match=r"^vote_runs: counts has 2 counts, expected 1$"):
        cuda_runs.vote_runs(words.new_zeros(1, 4), runs, words.new_zeros(4), tensor.long(), ties="coin", seed=0)


UNTYPED_OPS: Any = ops


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w: signvote.pack_signs(x.int()), TypeError, "pack_signs: x is torch.int32, expected float32"),
        (lambda x, w: signvote.pack_signs(x.view(10, 10).T), ValueError, "pack_signs: x is not contiguous"),
        (lambda x, w: signvote.pack_signs(x.to_sparse()), ValueError, "pack_signs: x has layout torch.sparse_coo"),
        (lambda x, w: signvote.pack_signs(torch._neg_view(x)), ValueError, "pack_signs: x has its negative bit set"),
        (lambda x, w: signvote.pack_signs(x, zeros="no"), ValueError, "pack_signs: zeros is 'no', expected 'coin'"),
        (
            lambda x, w: signvote.pack_signs(x, seed=-1),
            ValueError,
            "pack_signs: seed is -1, expected an integer from 0",
        ),
        (lambda x, w: signvote.pack_signs(x, out=w[:3]), ValueError, "pack_signs: out has 3 words, expected 4"),
        (
            lambda x, w: signvote.pack_signs(x, out=w.long()),
            TypeError,
            "pack_signs: out is torch.int64, expected int32",
        ),
        (
            lambda x, w: signvote.pack_signs(x, out=w.to("meta")),
            ValueError,
            "pack_signs: out is on device meta, expected ",
        ),
        (
            lambda x, w: UNTYPED_OPS.pack_signs(x, out=w.cpu().numpy()),
            TypeError,
            "pack_signs: out is a ndarray, expected a torch",
        ),
        (lambda x, w: signvote.pack_signs(x, out=x.view(torch.int32)[:4]), ValueError, "pack_signs: out overlaps x"),
        (
            lambda x, w: signvote.pack_signs(x, implementation="avx2"),
            ValueError,
            "pack_signs: implementation is 'avx2'",
        ),
        (
            lambda x, w: signvote.pack_signs(x, num_threads=2),
            ValueError,
            "pack_signs: num_threads is 2, expected None for a",
        ),
        (
            lambda x, w: ops.pack_momentum(x, x.clone(), coefficients=(1, 2, 3)),
            ValueError,
            "pack_momentum: coefficients is (1, 2, 3), expected four finite numbers",
        ),
        (
            lambda x, w: ops.pack_momentum(x, x.clone(), coefficients=(1, 2, 3, 1e39)),
            ValueError,
            "pack_momentum: coefficients is [1.0, 2.0, 3.0, 1e+39], expected four finite numbers",
        ),
        (
            lambda x, w: ops.pack_momentum(x, x.double(), coefficients=LION),
            TypeError,
            "pack_momentum: momentum is float64, expected float32 for a float32 x",
        ),
        (
            lambda x, w: ops.pack_momentum(x, x[1:].clone(), coefficients=LION),
            ValueError,
            "pack_momentum: momentum has 99 coordinates, expected 100",
        ),
        (lambda x, w: ops.pack_momentum(x, x, coefficients=LION), ValueError, "pack_momentum: momentum overlaps x"),
        (lambda x, w: signvote.majority_vote([]), ValueError, "majority_vote: stack has 0 rows, expected 1 to 65535"),
        (lambda x, w: signvote.majority_vote(w), ValueError, "majority_vote: stack has 1 dimensions, expected 2"),
        (
            lambda x, w: UNTYPED_OPS.majority_vote([w, w[1:]]),
            ValueError,
            "majority_vote: stack[1] has 3 words, expected 4",
        ),
        (lambda x, w: signvote.majority_vote(w.view(2, 2).T), ValueError, "majority_vote: stack is not contiguous"),
        (
            lambda x, w: signvote.majority_vote(w[None], numel=129),
            ValueError,
            "majority_vote: stack has 4 words in a row, expected 5 for numel 129",
        ),
        (lambda x, w: signvote.majority_vote(w[None], out=w), ValueError, "majority_vote: out overlaps stack"),
        (lambda x, w: signvote.majority_vote([w.clone(), w], out=w), ValueError, "majority_vote: out overlaps stack"),
        (
            lambda x, w: signvote.unpack_signs(w, 129),
            ValueError,
            "unpack_signs: words has 4 words, expected 5 for numel",
        ),
        (
            lambda x, w: signvote.unpack_signs(w, 128, dtype="int8"),
            TypeError,
            "unpack_signs: dtype is 'int8', expected",
        ),
        (lambda x, w: signvote.unpack_signs(w, 128, scale=1e39), ValueError, "unpack_signs: scale is 1e+39, expected"),
        (lambda x, w: signvote.unpack_signs(w, 100, out=x[1:]), ValueError, "unpack_signs: out has 99 coordinates"),
    ],
)
def test_errors(
    device: torch.device, call: Callable[[torch.Tensor, torch.Tensor], Any], error: type[Exception], message: str
) -> None:
    x, w = torch.ones(100, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    with pytest.raises(error) as raised:
        call(x, w)
    assert str(raised.value).startswith(message)


def test_tensors_without_memory(device: torch.device) -> None:
    ones, words = torch.ones(100, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    message = r"is a \w*Tensor without memory of its own, expected a plain tensor$"
    for x in without_memory(torch.float32, 100, device):
        with pytest.raises(ValueError, match="^pack_signs: x " + message):
            signvote.pack_signs(x)
        with pytest.raises(ValueError, match="^has_nonfinite: x " + message):
            signvote.has_nonfinite(x)
        with pytest.raises(ValueError, match="^pack_momentum: momentum " + message):
            ops.pack_momentum(ones, x, coefficients=LION)
        with pytest.raises(ValueError, match="^unpack_signs: out " + message):
            signvote.unpack_signs(words, 100, out=x)
    for words_of_none in without_memory(torch.int32, 4, device):
        with pytest.raises(ValueError, match="^pack_signs: out " + message):
            signvote.pack_signs(ones, out=words_of_none)
        with pytest.raises(ValueError, match=r"^majority_vote: stack\[1\] " + message):
            signvote.majority_vote([words, words_of_none])
        with pytest.raises(ValueError, match="^unpack_signs: words " + message):
            signvote.unpack_signs(words_of_none, 100)
    empty = torch.empty(0, device=device)
    assert signvote.pack_signs(empty).shape == (0,)
    assert not signvote.has_nonfinite(empty)


def test_ops_on_runs_take_cuda_tensors_only(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = cuda_runs.DeviceRuns.of(np.array([[0, 0, 100, 0, 0]]), 100, 4, device)
    x, words = torch.ones(100, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    pack: Any = functools.partial(cuda_runs.pack_runs, zeros="coin", seed=0)
    unpack: Any = cuda_runs.unpack_runs
    there = "expected a tensor on a CUDA device$"
    with pytest.raises(TypeError, match=r"^pack_runs: bucket is a ndarray, " + there):
        pack(np.ones(100, np.float32), None, LION, runs, words, counts)
    with pytest.raises(TypeError, match=r"^pack_runs: momentum is a NumPy array, " + there):
        pack(x, np.ones(100, np.float32), LION, runs, words, counts)
    with pytest.raises(TypeError, match=r"^pack_runs: out is a NumPy array, " + there):
        pack(x, None, LION, runs, np.zeros(4, np.uint32), counts)
    with pytest.raises(TypeError, match=r"^unpack_runs: bucket is a NumPy array, " + there):
        unpack(words, runs, np.ones(100, np.float32))
    module: Any = cuda.find_module()
    rows = words.new_zeros(1, 4)
    for name in ("majority_vote", "vote_runs"):
        second, pieces = (None, ()) if name == "majority_vote" else (runs.runs, (runs.vote_pieces,))
        with pytest.raises(TypeError, match=rf"^{name}: (stack|rows) is \[tensor.*expected an \(M, W\) tensor$"):
            getattr(module, name)([rows[0], rows[0]], second, "coin", 0, words, *pieces, None, 0, 0)
    with pytest.raises(TypeError, match=r"^pack_signs: x is torch.bfloat16, expected float16$"):
        module.pack_signs(x.bfloat16(), "float16", "coin", 0, words, None, 0, 0)
    with pytest.raises(TypeError, match=r"^vote_runs: runs is <class 'torch.Tensor'>, expected a NumPy array$"):
        module.vote_runs(rows, runs.pieces, "coin", 0, words, runs.vote_pieces, None, 0, 0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    with pytest.raises(ValueError, match=r"^pack_runs: bucket is on device cpu, expected a CUDA device$"):
        pack(torch.ones(100), None, LION, runs, words, counts)
    with pytest.raises(ValueError, match=r"^pack_signs: x is on device cpu, " + there):
        module.pack_signs(torch.ones(100), "float32", "coin", 0, words, None, 0, 0)


def test_pieces_belong_to_the_runs(device: torch.device) -> None:
    runs, other = (
        cuda_runs.DeviceRuns.of(np.array([[0, 0, numel, 0, 0]]), 9000, 300, device) for numel in (9000, 2000)
    )
    x, words = torch.ones(9000, device=device), torch.zeros(300, dtype=torch.int32, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    module: Any = cuda.find_module()

    def pack(pieces: Any) -> None:
        module.pack_runs(x, "float32", None, LION, runs.runs, "coin", 0, words, pieces, counts, 0, 0)

    with pytest.raises(ValueError, match=r"^pack_runs: pieces has 2 rows, expected 9$"):
        pack(other.pieces)
    with pytest.raises(ValueError, match=r"^pack_runs: pieces has 3 rows, expected 9$"):
        pack(runs.vote_pieces)
    with pytest.raises(ValueError, match=r"^pack_runs: pieces has shape torch.Size\(\[45\]\), expected \(n, 5\)$"):
        pack(runs.pieces.view(-1))
    with pytest.raises(TypeError, match=r"^pack_runs: pieces is torch.float64, expected int64$"):
        pack(runs.pieces.double())
    with pytest.raises(TypeError, match="incompatible function arguments"):
        pack(None)
    assert runs != cuda_runs.DeviceRuns(runs.runs, runs.pieces, runs.vote_pieces)


def test_counts_have_memory_of_their_own(device: torch.device) -> None:
    runs = cuda_runs.DeviceRuns.of(np.array([[0, 0, 64, 0, 0]]), 64, 8, device)
    x, words = torch.ones(64, device=device), torch.zeros(8, dtype=torch.int32, device=device)
    for counts, name in (
        (x.view(torch.int64)[:2], "another argument"),
        (words.view(torch.int64)[2:], "another argument"),
        (runs.pieces[0, :2], "the pieces of runs"),
    ):
        with pytest.raises(ValueError, match=f"^pack_runs: counts overlaps {name}, expected memory of its own$"):
            cuda_runs.pack_runs(x, None, LION, runs, words, counts, zeros="coin", seed=0)
    rows = torch.zeros(2, 8, dtype=torch.int32, device=device)
    tied = rows[1].view(torch.int64)[:1]
    with pytest.raises(ValueError, match=r"^vote_runs: counts overlaps the rows, expected memory of its own$"):
        cuda_runs.vote_runs(rows, runs, words, tied, ties="coin", seed=0)
    for other in (torch.float64, torch.uint64, torch.complex64):
        with pytest.raises(TypeError, match=f"^vote_runs: counts is {other}, expected int64$"):
            cuda_runs.vote_runs(rows, runs, words, tied.clone().view(other), ties="coin", seed=0)


def test_device_that_the_kernels_were_not_built_for(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [stand_in.can_run(device) for device in (0, 1, 2)] == [True, False, False]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    message = (
        "pack_signs: CUDA: cudaErrorNoKernelImageForDevice: no kernel image is available: device 1 has compute "
        "capability 0.0, signvote was built for the architectures none"
    )
    with pytest.raises(RuntimeError) as raised:
        stand_in.pack_signs(torch.ones(9), "float32", "coin", 0, torch.zeros(1, dtype=torch.int32), None, 1, 0)
    assert str(raised.value) == message
    with pytest.raises(RuntimeError, match=r"^pack_signs: CUDA: cudaErrorInvalidDevice: invalid device ordinal$"):
        stand_in.pack_signs(torch.ones(9), "float32", "coin", 0, torch.zeros(1, dtype=torch.int32), None, 2, 0)


def test_available_if_the_kernels_run(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_module", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for version, device, expected in (("13.0", 0, True), ("13.0", 1, False), (None, 0, False)):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        assert signvote.cuda_available() is expected


def sparse(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, of which only what is written to takes memory."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, numel * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    return torch.frombuffer(memory, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("device", ["stand-in"], indirect=True)
def test_runs_beyond_32_bits(device: torch.device, dtype: str) -> None:
    """Coordinates from 2**32 on, words from 2**31 on: what leads to them is 64 bits wide."""
    rng = np.random.default_rng(0)
    numel, coordinate, word, seed = 9000, 2**32 + 8 * 77, 2**31 + 4 * 33, 5
    end, words_end, width = coordinate + numel, word + 282, 282
    runs = np.array([[3, 2**38, numel, coordinate, word]])
    on_device = cuda_runs.DeviceRuns.of(runs, end, words_end, device)
    near = np.array([[3, 2**38, numel, 0, 0]])
    stored = mixture(rng, numel, dtype)
    start = mixture(rng, numel, "float64" if dtype == "float64" else "float32", finite=True)
    bucket, momentum = sparse(end, AS_TENSOR[dtype]), sparse(end, AS_TENSOR[str(start.dtype)])
    out, counts = sparse(words_end, torch.int32), torch.zeros(2, dtype=torch.int64)
    bucket[coordinate:] = to_tensor(stored, device, dtype)
    expected = np.zeros(width, np.uint32)
    for kept in (None, momentum):
        momentum[coordinate:] = to_tensor(start, device, str(start.dtype))
        cuda_runs.pack_runs(bucket, kept, LION, on_device, out, counts, zeros="coin", seed=seed)
        before = None if kept is None else start.copy()
        found = reference.pack_runs(values(stored, dtype), before, LION, near, expected, "coin", seed)
        assert np.array_equal(to_numpy(out[word:]), expected)
        assert tuple(counts.tolist()) == found
        if before is not None:
            assert same_floats(to_numpy(momentum[coordinate:]), before)

    memory = sparse(words_end + 600, torch.int32)  # of rows that overlap
    bits = rng.integers(0, 2**32, width + 600, dtype=np.uint32)
    memory[word:] = to_tensor(bits, device)
    rows = memory.as_strided((4, words_end), (200, 1))
    cuda_runs.vote_runs(rows, on_device, out, counts[:1], ties="coin", seed=seed)
    tied = reference.vote_runs([bits[200 * i :] for i in range(4)], near, expected, "coin", seed)
    assert np.array_equal(to_numpy(out[word:]), expected)
    assert counts[0] == tied

    cuda_runs.unpack_runs(out, on_device, bucket, scale=0.5)
    unpacked = np.where(reference.bits_of(expected, numel), 0.5, -0.5)
    assert np.array_equal(bucket[coordinate:].double().numpy(), unpacked)


def test_autograd_is_left_alone(device: torch.device) -> None:
    x = torch.ones(40, device=device, requires_grad=True)
    assert not signvote.pack_signs(x).requires_grad
    with pytest.raises(ValueError, match=r"^unpack_signs: out requires gradients"):
        signvote.unpack_signs(torch.zeros(2, dtype=torch.int32, device=device), 40, out=x)


# -- On a GPU only -----------------------------------------------------------------------------------------------------

LARGE = 2**32 + 5 * TILE + 77  # coordinates


@pytest.fixture
def gpu() -> torch.device:
    """A device, with none of the memory that earlier tests had."""
    torch.cuda.empty_cache()
    return torch.device("cuda", 0)


def need_memory(num_bytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < num_bytes:
        pytest.skip(f"needs {num_bytes / 1e9:.0f} GB of free device memory")


@pytest.mark.gpu
def test_more_than_2_to_the_32_coordinates(gpu: torch.device) -> None:
    need_memory(6 * LARGE)
    x = torch.full((LARGE,), -1.0, dtype=torch.float16, device=gpu)
    ones = torch.tensor([0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 4 * TILE, LARGE - 1], device=gpu)
    x[ones] = 1
    words = signvote.pack_signs(x)
    assert words.ne(0).nonzero().flatten().tolist() == sorted({index // 32 for index in ones.tolist()})
    assert not signvote.has_nonfinite(x)
    assert torch.equal(signvote.majority_vote(words.expand(3, -1), numel=LARGE), words)
    assert torch.equal(signvote.unpack_signs(words, LARGE, dtype="float16"), x)
    x[-1] = float("nan")
    assert signvote.has_nonfinite(x)


@pytest.mark.gpu
def test_momentum_of_more_than_2_to_the_32_coordinates(gpu: torch.device) -> None:
    need_memory(8 * LARGE)
    x = torch.zeros(LARGE, dtype=torch.float16, device=gpu)
    momentum = torch.full((LARGE,), -1.0, device=gpu)
    ones = torch.tensor([0, 2**31, 2**32 - 1, 2**32, LARGE - 1], device=gpu)
    x[ones] = 3
    words = ops.pack_momentum(x, momentum, coefficients=(0.5, 0.5, 0.5, 0.5))
    assert words.ne(0).nonzero().flatten().tolist() == sorted({index // 32 for index in ones.tolist()})
    assert momentum.eq(-0.5).sum().item() == LARGE - len(ones)
    assert (momentum[ones] == 1).all()


@pytest.mark.gpu
def test_side_streams(gpu: torch.device) -> None:
    """Ops do not overtake what is on their stream, and the memory of runs is kept for ops that are still to come."""
    numel = 2**22 + 77
    host = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    host[host == 0] = 1  # whose coins follow from the place of a run
    expected = signvote.pack_signs(host)
    source = host.to(gpu)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(gpu) for _ in range(3)]  # type: ignore[no-untyped-call]
    found = []
    for round_ in range(20):
        with torch.cuda.stream(streams[round_ % 3]):
            x = torch.zeros(numel, device=gpu)
            torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
            x.copy_(source)
            words = torch.zeros((numel + 31) // 32, dtype=torch.int32, device=gpu)
            counts = torch.zeros(2, dtype=torch.int64, device=gpu)
        row = np.array([[0, 0, numel, 0, 0]])
        runs = cuda_runs.DeviceRuns.of(row, numel, words.numel(), gpu)  # in memory of the default stream
        with torch.cuda.stream(streams[round_ % 3]):
            cuda_runs.pack_runs(x, None, LION, runs, words, counts, zeros="coin", seed=0)
            found.append((signvote.pack_signs(x), words, signvote.unpack_signs(words, numel)))
        size = runs.pieces.numel()
        del runs
        torch.full((size,), -1, dtype=torch.int64, device=gpu)  # where the pieces were, were they not kept
    torch.cuda.synchronize()
    signs = torch.where(host > 0, 1.0, -1.0)
    for packed, words, unpacked in found:
        assert torch.equal(packed.cpu(), expected)
        assert torch.equal(words.cpu(), expected)
        assert torch.equal(unpacked.cpu(), signs)


# -- Without a device, nor a stand-in ----------------------------------------------------------------------------------


FAKE_MODE = FakeTensorMode()


def fake_tensor(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Without memory, on a device that need not be there."""
    with FAKE_MODE:
        return torch.empty(shape, dtype=dtype, device=device)


def test_without_the_cuda_part_the_error_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_module", lambda: None)
    assert signvote.cuda_available() is False
    x, momentum = (fake_tensor(64, dtype=torch.float32, device="cuda:0") for _ in range(2))
    words = fake_tensor(2, dtype=torch.int32, device="cuda:0")
    stack = fake_tensor(1, 2, dtype=torch.int32, device="cuda:0")
    calls: dict[str, Callable[[], object]] = {
        "pack_signs: x": lambda: signvote.pack_signs(x),
        "pack_momentum: x": lambda: ops.pack_momentum(x, momentum, coefficients=LION),
        "majority_vote: stack": lambda: signvote.majority_vote(stack),
        "majority_vote: stack[0]": lambda: signvote.majority_vote([words]),
        "unpack_signs: words": lambda: signvote.unpack_signs(words, 64),
        "has_nonfinite: x": lambda: signvote.has_nonfinite(x),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError) as raised:
            call()
        assert str(raised.value).startswith(f"{name} is on device cuda:0, but signvote was built without its CUDA part")
        assert cuda.BUILD_COMMAND in str(raised.value)


def test_devices_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_module", lambda: object())
    monkeypatch.setattr(arguments, "_has_memory", lambda x: True)
    x = fake_tensor(64, dtype=torch.float32, device="cuda:0")
    words = fake_tensor(2, dtype=torch.int32, device="cuda:1")
    for out, device in ((words, "cuda:1"), (torch.zeros(2, dtype=torch.int32), "cpu")):
        with pytest.raises(ValueError, match=f"^pack_signs: out is on device {device}, expected cuda:0$"):
            signvote.pack_signs(x, out=out)
    with pytest.raises(ValueError, match=r"^pack_signs: out is on device cuda:1, expected cpu$"):
        signvote.pack_signs(torch.ones(100), out=words)
    with pytest.raises(ValueError, match=r"^majority_vote: stack\[1\] is on device cpu, expected cuda:1$"):
        signvote.majority_vote([words, torch.zeros(2, dtype=torch.int32)])
    tally: signvote.VoteTally[torch.Tensor] = signvote.VoteTally(64, 3)
    with pytest.raises(ValueError, match=r"^VoteTally.add: words is on device cuda:1, expected cpu$"):
        tally.add(words)
