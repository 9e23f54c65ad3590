"""The ops on CUDA tensors, bits equal to the reference: on a CUDA device, and on the stand-in for one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import reference
import signvote
from cuda_stand_in import AS_TENSOR, TILE, TILED_SIZES, VOTE_PIECE, each_dtype, same_floats, to_numpy, to_tensor
from samples import BITS, SIZES, STORED, bit_rows, finite_special, mixture, special, ternary_rows, values, word_rows
from signvote import cuda_runs, ops

SEED = 2**63 + 12345
UNDECIDED = ("coin", "positive", "negative")
LION = (0.9, 0.1, 0.99, 0.01)
SIGNUM = (0.9, 1 - 0.9, 0.9, 1 - 0.9)

pytestmark = pytest.mark.timeout(600)  # compilers, on a machine that may be busy


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


@pytest.mark.parametrize("numel", [*SIZES[::3], *TILED_SIZES])
@each_dtype
def test_pack_ternary(device: torch.device, dtype: str, numel: int) -> None:
    stored = mixture(np.random.default_rng(numel), numel, dtype)
    width = (numel + 31) // 32
    for threshold, offset in ((0.0, 0), (0.5, 1), (np.inf, 8)):
        expected, *_ = reference.pack_ternary(values(stored, dtype), threshold)
        x = to_tensor(stored, device, dtype, offset)
        assert np.array_equal(to_numpy(signvote.pack_ternary(x, threshold=threshold)), expected)
        memory = torch.full((3, width + offset), 7, dtype=torch.int32, device=device)
        out = memory[::2, :width]
        assert signvote.pack_ternary(x, threshold=threshold, out=out) is out
        assert np.array_equal(to_numpy(out), expected)
        assert (memory[1] == 7).all()
        assert (memory[:, width:] == 7).all()
        assert np.array_equal(to_numpy(x), stored.view(BITS[dtype]))


@each_dtype
def test_thresholds_are_not_rounded(device: torch.device, dtype: str) -> None:
    stored: NDArray[Any] = np.concatenate([np.roll(special(dtype), shift) for shift in range(len(special(dtype)))])
    x = to_tensor(stored, device, dtype)
    magnitudes = {abs(value) for value in values(finite_special(dtype), dtype).astype(np.float64).tolist()}
    for magnitude in (*magnitudes, 0.1, 1e300):
        for threshold in (math.nextafter(magnitude, 0), magnitude, math.nextafter(magnitude, math.inf)):
            expected, *_ = reference.pack_ternary(values(stored, dtype), threshold)
            assert np.array_equal(to_numpy(signvote.pack_ternary(x, threshold=threshold)), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pack_ternary_of_every_16_bit_pattern(device: torch.device, dtype: str) -> None:
    stored: NDArray[Any] = np.arange(2**16, dtype=np.uint16).view(STORED[dtype])
    x = to_tensor(stored, device, dtype)
    for threshold in (0.0, 1e-6, 1.0, 70000.0, np.inf):
        expected, *_ = reference.pack_ternary(values(stored, dtype), threshold)
        assert np.array_equal(to_numpy(signvote.pack_ternary(x, threshold=threshold)), expected)


@pytest.mark.parametrize("num_rows", [*range(1, 18), 31, 127, 128, 1001])
def test_majority_vote_ternary(device: torch.device, num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    for numel in (0, 1, 33, 65, 2 * VOTE_PIECE) if num_rows < 20 else (65,):
        rows = ternary_rows(rng, num_rows, numel)
        stack = to_tensor(rows, device).view(rows.shape)
        for quorum in (1, 2, num_rows, num_rows + 1, 2**64 - 1):
            expected, _ = reference.majority_vote_ternary(list(rows), numel, quorum)
            votes = signvote.majority_vote_ternary(stack, quorum=quorum, numel=numel)
            assert np.array_equal(to_numpy(votes), expected)


@pytest.mark.parametrize(
    ("shift", "out_shift", "gap", "plane_gap"),
    [(0, 0, 0, 0), (1, 0, 0, 0), (0, 3, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2, 2, 4, 4), (0, 0, 4, 4)],
)
def test_majority_vote_ternary_at_any_address(
    device: torch.device, shift: int, out_shift: int, gap: int, plane_gap: int
) -> None:
    """Planes of whole pieces, that begin, or lie apart, or are written, at multiples of 16 bytes or elsewhere."""
    numel = 2 * VOTE_PIECE + 100
    width = (numel + 31) // 32
    plane = width // 4 * 4 + 4 + plane_gap
    row = 2 * plane + gap
    memory = np.random.default_rng(shift).integers(0, 2**32, 5 * row + shift, dtype=np.uint32)

    def planes_in(x: Any) -> Any:
        return x[shift:].reshape(5, row)[:, : 2 * plane].reshape(5, 2, plane)[:, :, :width]

    rows = planes_in(memory)
    expected, _ = reference.majority_vote_ternary(list(rows), numel, 2)
    stack = to_tensor(memory, device)[shift:].as_strided((5, 2, width), (row, plane, 1))
    out = torch.full((2, width + out_shift + 1), 7, dtype=torch.int32, device=device)
    written = out[:, out_shift:-1]
    assert signvote.majority_vote_ternary(stack, quorum=2, numel=numel, out=written) is written
    assert np.array_equal(to_numpy(written), expected)
    assert (out[:, :out_shift] == 7).all()
    assert (out[:, -1] == 7).all()


def test_majority_vote_ternary_of_the_most_rows(device: torch.device) -> None:
    numel, num_rows = 67, 65535
    rows = ternary_rows(np.random.default_rng(0), num_rows, numel)
    rows[:, 0, 0] |= 1  # all are positive at coordinate 0, and negative at coordinate 1
    rows[:, 0, 0] &= ~np.uint32(2)
    rows[:, 1, 0] |= 3
    stack = to_tensor(rows, device).view(rows.shape)
    for quorum in (1, num_rows, num_rows + 1):
        expected, _ = reference.majority_vote_ternary(list(rows), numel, quorum)
        assert np.array_equal(to_numpy(signvote.majority_vote_ternary(stack, quorum=quorum, numel=numel)), expected)


def test_majority_vote_ternary_of_lists(device: torch.device) -> None:
    wide = np.random.default_rng(3).integers(0, 2**32, (6, 2, 13), dtype=np.uint32)
    on_device = to_tensor(wide, device).view(wide.shape)
    for rows, columns in ((slice(None), slice(2, 9)), (slice(None, None, 2), slice(7)), (slice(1), slice(1, 8))):
        expected, _ = reference.majority_vote_ternary(list(wide[rows, :, columns]), 220)
        listed: list[torch.Tensor] = list(on_device[rows, :, columns])
        assert np.array_equal(to_numpy(signvote.majority_vote_ternary(listed, numel=220)), expected)
    # Between the planes there is room for the result.
    out = on_device[1:3, 0, 9:]
    expected, _ = reference.majority_vote_ternary(list(wide[..., :4]), 128)
    assert signvote.majority_vote_ternary(on_device[..., :4], numel=128, out=out) is out
    assert np.array_equal(to_numpy(out), expected)


@pytest.mark.parametrize("numel", [*SIZES[::3], *TILED_SIZES])
@each_dtype
def test_unpack_ternary(device: torch.device, dtype: str, numel: int) -> None:
    width = (numel + 31) // 32
    memory = np.random.default_rng(numel).integers(0, 2**32, (2, width + 1), dtype=np.uint32)
    planes = to_tensor(memory, device).view(memory.shape)[:, :width]
    found = torch.from_numpy(reference.ternary_of(memory, numel))
    for scale, offset in ((1.0, 0), (-0.3, 1), (0.0, 8)):
        coordinates = torch.full((numel + offset + 9,), 7.0, dtype=AS_TENSOR[dtype], device=device)
        out = coordinates[offset : offset + numel]
        assert signvote.unpack_ternary(planes, numel, scale=scale, out=out) is out
        value = torch.tensor(scale, dtype=AS_TENSOR[dtype])
        expected = torch.where(found == 0, torch.zeros_like(value), torch.where(found > 0, value, -value))
        assert np.array_equal(to_numpy(out), to_numpy(expected))
        assert (coordinates[:offset] == 7).all()
        assert (coordinates[offset + numel :] == 7).all()
        assert signvote.unpack_ternary(planes, numel, dtype=AS_TENSOR[dtype]).shape == (numel,)


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
def test_abstention_at_more_than_2_to_the_32_coordinates(gpu: torch.device) -> None:
    need_memory(8 * LARGE)
    x = torch.zeros(LARGE, dtype=torch.float16, device=gpu)
    ones = torch.tensor([0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 4 * TILE, LARGE - 1], device=gpu)
    x[ones] = torch.tensor([1.0, -1, 1, -1, 1, -1, 1], dtype=torch.float16, device=gpu)
    planes = signvote.pack_ternary(x, threshold=0.5)
    assert planes[1].ne(0).nonzero().flatten().tolist() == sorted({index // 32 for index in ones.tolist()})
    assert torch.equal(signvote.majority_vote_ternary(planes.expand(3, -1, -1), numel=LARGE), planes)
    assert torch.equal(signvote.unpack_ternary(planes, LARGE, dtype="float16"), x)


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
            planes = signvote.pack_ternary(x)
            restored = signvote.unpack_ternary(signvote.majority_vote_ternary([planes, planes], numel=numel), numel)
            found.append((signvote.pack_signs(x), words, signvote.unpack_signs(words, numel), restored))
        size = runs.pieces.numel()
        del runs
        torch.full((size,), -1, dtype=torch.int64, device=gpu)  # where the pieces were, were they not kept
    torch.cuda.synchronize()
    signs = torch.where(host > 0, 1.0, -1.0)
    for packed, words, unpacked, restored in found:
        assert torch.equal(packed.cpu(), expected)
        assert torch.equal(words.cpu(), expected)
        assert torch.equal(unpacked.cpu(), signs)
        assert torch.equal(restored.cpu(), signs)
