"""The ops over runs on CUDA tensors, and the codec of the hook: on a CUDA device, and on the stand-in for one."""

from __future__ import annotations

import mmap
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import reference
from cuda_stand_in import AS_TENSOR, each_dtype, same_floats, to_numpy, to_tensor
from samples import BITS, mixture, store, values
from signvote import cuda_runs
from signvote.ddp.ballot import Ballot
from signvote.ddp.codec import Layouts
from signvote.ddp.cuda_codec import CudaCodec, Streams
from signvote.ddp.layout import BucketLayout, MessageLayout
from signvote.ddp.options import Coefficients, Threshold
from signvote.ddp.stats import Counters
from signvote.ddp.topology import Sharded

SEED = 2**63 + 12345
LION = (0.9, 0.1, 0.99, 0.01)
SIGNUM = (0.9, 0.1, 0.9, 0.1)

pytestmark = pytest.mark.timeout(600)  # compilers, on a machine that may be busy


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


@pytest.mark.parametrize("numels", [[], [1], [64, 0, 65, 63], [5000, 1, 1024, 1024, 3000, 9000]], ids=len)
@each_dtype
def test_ternary_runs(device: torch.device, dtype: str, numels: list[int]) -> None:
    rng = np.random.default_rng(0)
    runs, num_coordinates, width = runs_of(numels, rng)
    stride = width + 1
    num_words = stride + width + 3
    on_device = cuda_runs.DeviceRuns.of(runs, num_coordinates, num_words, device)
    stored = mixture(rng, num_coordinates, dtype)
    rows = rng.integers(0, 2**32, (5, num_words), dtype=np.uint32)
    counts = torch.full((2,), -1, dtype=torch.int64, device=device)
    expected = rows[0].copy()
    out = to_tensor(expected, device)
    bucket = to_tensor(stored, device, dtype)
    cuda_runs.pack_ternary_runs(bucket, on_device, out, counts, stride=stride, threshold=0.5)
    found = reference.pack_ternary_runs(values(stored, dtype), runs, expected, stride, 0.5)
    assert np.array_equal(to_numpy(out), expected)
    assert tuple(counts.tolist()) == found

    expected = rows[0].copy()
    out, zeros = to_tensor(expected, device), torch.full((1,), -1, dtype=torch.int64, device=device)
    stack = to_tensor(rows, device).view(rows.shape)
    cuda_runs.vote_ternary_runs(stack, on_device, out, zeros, stride=stride, quorum=2)
    assert reference.vote_ternary_runs(list(rows), runs, expected, stride, 2) == zeros.item()
    assert np.array_equal(to_numpy(out), expected)

    cuda_runs.unpack_ternary_runs(to_tensor(rows[0], device), on_device, stride, bucket, scale=0.5)
    scale: NDArray[Any] = store(np.array([0.0, 0.5, -0.5]), dtype).view(BITS[dtype])
    unpacked = stored.view(BITS[dtype]).copy()
    for _, _, numel, coordinate, word in runs.tolist():
        ternary = reference.ternary_of(reference.planes_in(rows[0], word, numel, stride), numel)
        unpacked[coordinate : coordinate + numel] = scale[ternary]
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


def new_codec(
    device: torch.device, bucket: torch.Tensor, num_planes: int, monkeypatch: pytest.MonkeyPatch
) -> CudaCodec:
    """Of parameters of which one is dense, between two that are voted on."""
    if device.type == "cpu":
        for name in ("Stream", "Event"):
            monkeypatch.setattr(torch.cuda, name, AtOnce)
        monkeypatch.setattr(torch.cuda, "current_stream", AtOnce)
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    layout = BucketLayout(NUMELS, PLACES, 3, dense=frozenset({DENSE}), itemsize=bucket.itemsize)
    messages = MessageLayout(layout, num_planes, num_numbers=3)
    exchange = Sharded(messages, messages, 0, 3, torch.device("cpu"))
    return CudaCodec(bucket, Layouts(messages, messages, messages), exchange, Counters(), Streams.of(device))


NUMELS, PLACES, DENSE = [5000, 1, 300, 70], [2, 0, 3, 1], 3
IN_DENSE = np.repeat(PLACES, NUMELS) == DENSE


def ballot(coefficients: Coefficients, seed: int, **options: Any) -> Ballot:
    other = {"threshold": None, "dither": 0.0, "is_finite_only": True} | options
    return Ballot(
        coefficients=coefficients,
        zeros="coin",
        seed=seed,
        dither_seed=lambda place: place,
        has_magnitudes=True,
        **other,
    )


def mean_magnitudes(x: NDArray[Any]) -> list[np.float32]:
    """Of each voted parameter, what is not finite left out."""
    finite = np.where(np.isfinite(x), x, 0.0)
    parts = np.split(np.abs(finite), np.cumsum(NUMELS)[:-1])
    with np.errstate(over="ignore"):
        return [np.float32(part.mean()) for part, place in zip(parts, PLACES, strict=True) if place != DENSE]


def dense_bits(codec: CudaCodec, message: torch.Tensor, bucket: torch.Tensor) -> NDArray[Any]:
    """Of the dense parameter, in a message."""
    rows = codec._sent_layout.dense_of(message, bucket.dtype)
    pieces = codec._sent_layout.bucket.dense_pieces()
    found: NDArray[Any] = np.concatenate(
        [to_numpy(rows[piece.shard, piece.offset : piece.offset + piece.numel].clone()) for piece in pieces]
    )
    return found


@each_dtype
def test_codec_of_the_hook(device: torch.device, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    stored = mixture(rng, sum(NUMELS), dtype)
    start = mixture(rng, sum(NUMELS), "float64" if dtype == "float64" else "float32", finite=True)
    bucket, momentum = to_tensor(stored, device, dtype), to_tensor(start, device, str(start.dtype))
    codec = new_codec(device, bucket, 1, monkeypatch)
    layout, exchange, counters = codec._sent_layout, codec._exchange, codec._counters
    for step in range(2):
        expected: NDArray[np.uint32] = np.zeros(exchange.sent.words.shape, np.uint32)
        before, bits = bucket.to("cpu", copy=True).double().numpy(), to_numpy(bucket).copy()
        x = before.astype(start.dtype)
        zeros, nonfinite = reference.pack_runs(x, start, LION, layout.runs, expected.reshape(-1), "coin", step)
        codec.pack(bucket, momentum, ballot(LION, step), is_last=True)
        codec.settle()
        packed = codec.packed()
        assert (packed.zeros, packed.nonfinite) == (zeros, nonfinite + int((~np.isfinite(before[IN_DENSE])).sum()))
        np.testing.assert_allclose(packed.magnitudes, mean_magnitudes(before), rtol=1e-6)
        assert np.array_equal(to_numpy(layout.words_of(exchange.sent.words).clone()), layout_words(layout, expected))
        assert np.array_equal(dense_bits(codec, exchange.sent.words, bucket), bits[IN_DENSE])
        assert same_floats(to_numpy(momentum), start)

        words = rng.integers(0, 2**32, exchange.result.words.numel(), dtype=np.uint32)
        exchange.result.words.view(-1).copy_(torch.from_numpy(words.view(np.int32)))
        codec.unpack(bucket, scale=0.5)
        codec.hand_over()
        unpacked: NDArray[Any] = np.zeros(sum(NUMELS), bool)
        for _, _, numel, coordinate, word in layout.runs.tolist():
            unpacked[coordinate : coordinate + numel] = reference.bits_of(words[word:], numel)
        voted = bucket.double().cpu().numpy()
        assert np.array_equal(voted[~IN_DENSE], np.where(unpacked, 0.5, -0.5)[~IN_DENSE])
        assert np.array_equal(to_numpy(bucket)[IN_DENSE], dense_bits(codec, exchange.result.words, bucket))
    assert counters.pack_seconds > 0
    assert counters.unpack_seconds > 0
    codec.fill(bucket, torch.nan)
    codec.hand_over()
    assert bucket.isnan().all()


def layout_words(layout: MessageLayout, message: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return to_numpy(layout.words_of(torch.from_numpy(message.view(np.int32))).clone())


@pytest.mark.parametrize("coefficients", [None, SIGNUM, LION], ids=["gradient", "signum", "lion"])
@each_dtype
def test_codec_of_the_hook_with_abstention(
    device: torch.device, dtype: str, coefficients: Coefficients | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    wide = "float64" if dtype == "float64" else "float32"
    bucket = to_tensor(mixture(rng, sum(NUMELS), dtype, finite=True), device, dtype)
    codec = new_codec(device, bucket, 2, monkeypatch)
    layout, exchange = codec._sent_layout, codec._exchange
    x = bucket.double().cpu().numpy().astype(wide)
    sent, momentum, kept = x, None, x
    if coefficients is not None:
        start = mixture(rng, sum(NUMELS), wide, finite=True)
        momentum = to_tensor(start, device, wide)
        _, sent, _, _ = reference.pack_momentum(x, start, coefficients[:2] * 2)
        _, kept, _, _ = reference.pack_momentum(x, start, coefficients[2:] * 2)
        kept = np.where(IN_DENSE, start, kept)
    expected: NDArray[np.uint32] = np.zeros(exchange.sent.words.shape, np.uint32)
    votes = np.where(x == 0, 0, sent).astype(wide)
    reference.pack_ternary_runs(votes, layout.runs, expected.reshape(-1), layout.stride, 0.5)
    threshold = Threshold(0.5, is_relative=False)
    codec.pack(bucket, momentum, ballot(coefficients or SIGNUM, 0, threshold=threshold), is_last=True)
    codec.settle()
    packed = codec.packed()
    assert packed.zeros == int(((np.abs(votes) <= 0.5) & ~IN_DENSE).sum())
    assert packed.nonfinite == int((~np.isfinite(sent) & ~IN_DENSE).sum())
    assert np.array_equal(to_numpy(layout.words_of(exchange.sent.words).clone()), layout_words(layout, expected))
    if momentum is not None:
        assert same_floats(to_numpy(momentum), kept)

    words = rng.integers(0, 2**32, exchange.result.words.numel(), dtype=np.uint32)
    exchange.result.words.view(-1).copy_(torch.from_numpy(words.view(np.int32)))
    signs: NDArray[np.float64] = np.zeros(sum(NUMELS))
    for _, _, numel, coordinate, word in layout.runs.tolist():
        planes = reference.planes_in(words, word, numel, layout.stride)
        signs[coordinate : coordinate + numel] = reference.ternary_of(planes, numel)
    bucket.clamp_(-1e4, 1e4)  # so that no sum overflows
    x = bucket.double().cpu().numpy()
    np.testing.assert_allclose(codec.progress(bucket)(), (signs * x)[~IN_DENSE].sum(), rtol=1e-9)
    scales = [0.5, 2.0, 0.25]
    codec.unpack(bucket, scale=scales)
    codec.hand_over()
    factors = np.repeat([0.5, 2.0, np.nan, 0.25], NUMELS)
    assert np.array_equal(bucket.double().cpu().numpy()[~IN_DENSE], (signs * factors)[~IN_DENSE])


@pytest.mark.parametrize("threshold", [None, Threshold(0.3, is_relative=True)], ids=["noise", "relative_threshold"])
@each_dtype
def test_codec_of_the_hook_disturbs_a_copy(
    device: torch.device, dtype: str, threshold: Threshold | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    bucket = to_tensor(mixture(rng, sum(NUMELS), dtype, finite=True), device, dtype)
    bucket.clamp_(-100, 100)
    bits = to_numpy(bucket).copy()
    codec = new_codec(device, bucket, 1 if threshold is None else 2, monkeypatch)
    chosen = ballot(SIGNUM, 0, threshold=threshold, dither=0.0 if threshold else 0.5)
    wide = torch.float64 if dtype == "float64" else torch.float32
    votes = bucket.to(wide, copy=True)
    for part in codec._sent_layout.bucket.voted:
        value = part.of(votes)
        rms = value.double().square().mean().sqrt()
        if threshold is not None:
            value[value.abs() <= (0.3 * rms).to(wide)] = 0
        else:
            generator = torch.Generator(device).manual_seed(part.place)
            value += torch.randn(part.numel, dtype=wide, device=device, generator=generator) * (0.5 * rms).to(wide)
    expected: NDArray[np.uint32] = np.zeros(codec._exchange.sent.words.shape, np.uint32)
    layout, values_sent = codec._sent_layout, votes.cpu().numpy()
    if threshold is None:
        reference.pack_runs(values_sent, None, SIGNUM, layout.runs, expected.reshape(-1), "coin", 0)
    else:
        reference.pack_ternary_runs(values_sent, layout.runs, expected.reshape(-1), layout.stride, 0.0)
    codec.pack(bucket, None, chosen, is_last=True)
    codec.settle()
    assert np.array_equal(to_numpy(layout.words_of(codec._exchange.sent.words).clone()), layout_words(layout, expected))
    assert np.array_equal(to_numpy(bucket), bits)


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
    two_planes = words.new_zeros(4)
    cuda_runs.pack_ternary_runs(bucket, runs, two_planes, counts, stride=2)
    cuda_runs.vote_ternary_runs(two_planes[None].clone(), runs, two_planes, counts[:1], stride=2)
    cuda_runs.unpack_ternary_runs(two_planes, runs, 2, bucket)
    pieces, vote_pieces = runs.pieces.data_ptr(), runs.vote_pieces.data_ptr()
    assert recorded == [pieces, pieces, vote_pieces, pieces, pieces, vote_pieces, pieces]


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


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("device", ["stand-in"], indirect=True)
def test_ternary_runs_beyond_32_bits(device: torch.device, dtype: str) -> None:
    """Coordinates from 2**32 on, and planes that lie 2**31 words apart, or begin there."""
    rng = np.random.default_rng(0)
    numel, coordinate, stride, width = 9000, 2**32 + 8 * 77, 2**31 + 4 * 33, 282
    end, words_end = coordinate + numel, 2 * stride + width
    word = stride - 300
    runs = np.array([[0, 0, numel, coordinate, word]])
    on_device = cuda_runs.DeviceRuns.of(runs, end, words_end, device)
    stored = mixture(rng, numel, dtype)
    bucket = sparse(end, AS_TENSOR[dtype])
    bucket[coordinate:] = to_tensor(stored, device, dtype)
    out, counts = sparse(words_end, torch.int32), torch.zeros(2, dtype=torch.int64)

    def planes_in(words: torch.Tensor) -> Any:
        return np.stack([to_numpy(words[first : first + width]) for first in (word, word + stride)])

    cuda_runs.pack_ternary_runs(bucket, on_device, out, counts, stride=stride, threshold=0.5)
    expected, *found = reference.pack_ternary(values(stored, dtype), 0.5)
    assert np.array_equal(planes_in(out), expected)
    assert counts.tolist() == found

    memory = sparse(words_end + 600, torch.int32)  # of rows that overlap
    bits = rng.integers(0, 2**32, (2, width + 600), dtype=np.uint32)
    for first, plane in zip((word, word + stride), bits, strict=True):
        memory[first : first + width + 600] = to_tensor(plane, device)
    rows = memory.as_strided((4, words_end), (200, 1))
    cuda_runs.vote_ternary_runs(rows, on_device, out, counts[:1], stride=stride)
    stack = [bits[:, 200 * i : 200 * i + width] for i in range(4)]
    expected, zeros = reference.majority_vote_ternary(stack, numel)
    assert np.array_equal(planes_in(out), expected)
    assert counts[0] == zeros

    cuda_runs.unpack_ternary_runs(out, on_device, stride, bucket, scale=0.5)
    assert np.array_equal(bucket[coordinate:].double().numpy(), 0.5 * reference.ternary_of(expected, numel))
