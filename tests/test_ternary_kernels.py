"""Every implementation of the ops with abstention against the reference, bit for bit, through the native module."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import reference
import signvote
from samples import (
    BITS,
    DTYPES,
    SIZES,
    STORED,
    Guarded,
    finite_special,
    mixture,
    placed,
    special,
    store,
    ternary_rows,
    values,
)
from signvote import _core
from signvote.arguments import threshold_bits

OFFSETS = (0, 1, 3)

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_size = pytest.mark.parametrize("numel", SIZES)


def num_words(numel: int) -> int:
    return (numel + 31) // 32


def planes_at(numel: int, offset: int) -> tuple[Guarded, NDArray[np.uint32]]:
    """Guarded memory of two planes, of which the second begins right behind the first."""
    guarded = Guarded(2 * num_words(numel), np.uint32, offset)
    return guarded, guarded.array.reshape(2, num_words(numel))


def pack(stored: NDArray[Any], dtype: str, threshold: float, out: NDArray[Any], implementation: str) -> tuple[int, int]:
    limit = threshold_bits("pack_ternary", threshold, dtype)
    return _core.pack_ternary(stored, dtype, limit, out, implementation)


@each_size
@each_dtype
def test_pack_ternary(implementation: str, dtype: str, numel: int) -> None:
    for finite, threshold in itertools.product((True, False), (0.0, 0.5)):
        stored = mixture(np.random.default_rng(numel), numel, dtype, finite)
        expected, *counts = reference.pack_ternary(values(stored, dtype), threshold)
        for offset in OFFSETS:
            guarded, out = planes_at(numel, offset)
            assert pack(placed(stored, offset), dtype, threshold, out, implementation) == tuple(counts)
            assert np.array_equal(out, expected)
            assert guarded.guards_hold()


def thresholds(dtype: str) -> list[float]:
    """Values of the dtype, numbers right beside them and between them, and numbers beyond the largest."""
    found = {0.0, -0.0, 5e-324, 0.1, 0.3, 1 / 3, 1e-40, 1e-7, 65504.0, 65519.9, 65520.0, 3.4e38, 3.5e38, 1e300, np.inf}
    for value in map(float, abs(values(finite_special(dtype), dtype))):
        found |= {value, math.nextafter(value, np.inf), math.nextafter(value, 0.0)}
    return sorted(found)


@each_dtype
def test_thresholds(implementation: str, dtype: str) -> None:
    # Each special value at each position of a vector of any width, and those next to the threshold.
    bits = BITS[dtype]
    largest = float(values(finite_special(dtype), dtype).max())
    for threshold in thresholds(dtype):
        nearest = store(np.array([min(threshold, largest)]), dtype).view(bits).astype(np.int64)
        around = (nearest + np.arange(-2, 3)).clip(0)
        stored: NDArray[Any] = np.concatenate([special(dtype).view(bits), around.astype(bits)]).view(STORED[dtype])
        stored = np.concatenate([np.roll(stored, shift) for shift in range(stored.size)])
        expected, *counts = reference.pack_ternary(values(stored, dtype), threshold)
        out = np.empty_like(expected)
        assert pack(stored, dtype, threshold, out, implementation) == tuple(counts), threshold
        assert np.array_equal(out, expected), threshold


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_pattern(implementation: str, dtype: str) -> None:
    stored: NDArray[Any] = np.arange(2**16, dtype=np.uint16).view(STORED[dtype])
    for threshold in (0.0, 1e-6, 0.1, 1.0, 7e4, np.inf):
        expected, *counts = reference.pack_ternary(values(stored, dtype), threshold)
        out = np.empty_like(expected)
        assert pack(stored, dtype, threshold, out, implementation) == tuple(counts)
        assert np.array_equal(out, expected)


@each_dtype
def test_nan_in_each_position(implementation: str, dtype: str) -> None:
    numel = 1024 + 70
    rng = np.random.default_rng(0)
    finite = mixture(rng, numel, dtype, finite=True)
    nans = special(dtype)[np.isnan(values(special(dtype), dtype))]
    for i in range(numel):
        stored = finite.copy()
        stored[i] = rng.choice(nans)
        expected, *counts = reference.pack_ternary(values(stored, dtype), 0.25)
        out = np.empty_like(expected)
        assert pack(stored, dtype, 0.25, out, implementation) == tuple(counts)
        assert np.array_equal(out, expected), i


@each_dtype
def test_float_environment_changes_nothing(implementation: str, dtype: str) -> None:
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU cannot flush subnormal numbers")
    stored = np.tile(finite_special(dtype), 7)
    expected, *counts = reference.pack_ternary(values(stored, dtype), 0.0)
    out = np.empty_like(expected)
    torch.set_flush_denormal(True)
    try:
        found = _core.pack_ternary(stored, dtype, 0, out, implementation)
    finally:
        torch.set_flush_denormal(False)
    assert found == tuple(counts)
    assert np.array_equal(out, expected)


@functools.cache
def vote_case(num_rows: int, numel: int) -> tuple[NDArray[np.uint32], dict[int, tuple[NDArray[np.uint32], int]]]:
    """Ballots, and what to expect for each quorum."""
    rows = ternary_rows(np.random.default_rng(num_rows), num_rows, numel)
    lead = np.array([reference.ternary_of(row, numel) for row in rows]).sum(axis=0)
    quorums = (*range(1, num_rows + 1),) if num_rows <= 17 else (1, 2, 3, num_rows // 2, num_rows - 1, num_rows)
    expected = {}
    for quorum in (*quorums, num_rows + 1, num_rows + 2, 2**64 - 1):
        result = np.where(abs(lead).astype(object) < quorum, 0, lead)
        expected[quorum] = reference.planes_of(result), int(np.sum(result == 0))
    return rows, expected


def check_votes(implementation: str, num_rows: int, numel: int) -> None:
    rows, expected = vote_case(num_rows, numel)
    for quorum, (planes, zeros) in expected.items():
        guarded, out = planes_at(numel, num_rows % 4)
        assert _core.majority_vote_ternary(rows, numel, quorum, out, implementation) == zeros, quorum
        assert np.array_equal(out, planes), quorum
        assert guarded.guards_hold()


@pytest.mark.parametrize("num_rows", [*range(1, 66), 127, 128, 129, 255, 256, 257, 511, 512, 1023])
def test_majority_vote_of_rows(implementation: str, num_rows: int) -> None:
    for numel in (0, 1, 31, 33, 64, 65, 600):
        check_votes(implementation, num_rows, numel)


@each_size
def test_majority_vote_of_sizes(implementation: str, numel: int) -> None:
    for num_rows in (1, 2, 3, 4, 7, 8, 9, 17):
        check_votes(implementation, num_rows, numel)


def test_the_reference_votes_so() -> None:
    # vote_case takes a way of its own, for the sake of time.
    for num_rows, numel in ((1, 65), (4, 65), (9, 129)):
        rows, expected = vote_case(num_rows, numel)
        for quorum, (planes, zeros) in expected.items():
            found = reference.majority_vote_ternary(rows, numel, quorum)
            assert np.array_equal(found[0], planes)
            assert found[1] == zeros


def test_majority_vote_of_many_words(implementation: str) -> None:
    # More words than one tile of counters holds.
    check_votes(implementation, 20, 300_001)


@pytest.mark.parametrize("num_rows", [65534, 65535])
def test_majority_vote_of_most_rows(implementation: str, num_rows: int) -> None:
    # Column i is + in the first plus[i] rows, and - in the last minus[i].
    plus = np.array([0, 1, 0, 32767, 32768, 32767, num_rows, 0, num_rows - 1, 16383, 40000, 5])
    minus = np.array([0, 0, 1, 32767, 32766, 32767, 0, num_rows, 1, 16384, 20000, num_rows - 5])
    row = np.arange(num_rows)[:, None]
    ballots = np.where(row < plus, 1, np.where(row >= num_rows - minus, -1, 0))
    rows = np.stack([_words(ballots > 0), _words(ballots != 0)], axis=1)
    lead = plus - minus
    for quorum in (1, 2, 3, 20_000, 20_001, 65_533, num_rows, num_rows + 1):
        expected = reference.planes_of(np.where(abs(lead) < quorum, 0, lead))
        out = np.empty_like(expected)
        zeros = _core.majority_vote_ternary(rows, plus.size, quorum, out, implementation)
        assert np.array_equal(out, expected), quorum
        assert zeros == np.sum(abs(lead) < quorum)


def _words(bits: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Rows of up to 32 bits as a word each."""
    return (bits.astype(np.uint32) << np.arange(bits.shape[1], dtype=np.uint32)).sum(1, dtype=np.uint32)[:, None]


def test_majority_vote_of_strided_rows(implementation: str) -> None:
    rng = np.random.default_rng(3)
    wide = rng.integers(0, 2**32, (6, 3, 13), dtype=np.uint32)
    stacks = (
        wide[:, :2, 2:9],
        wide[::-1, ::2, 1:8],
        wide[::2, 2:0:-1, :7],
        np.broadcast_to(wide[0, :2, 3:10], (4, 2, 7)),
        np.broadcast_to(wide[:, :1, 3:10], (6, 2, 7)),
        wide[:1, 1:, :7],
    )
    for stack in stacks:
        expected, zeros = reference.majority_vote_ternary(stack, 220, 2)
        out = np.empty((2, 7), np.uint32)
        for rows in (stack, list(stack)):
            assert _core.majority_vote_ternary(rows, 220, 2, out, implementation) == zeros
            assert np.array_equal(out, expected)
    # Between the planes there is room for those of the result.
    out = wide[2:4, 0, 9:]
    expected, zeros = reference.majority_vote_ternary(wide[:, 1:, :4], 128, 1)
    assert _core.majority_vote_ternary(wide[:, 1:, :4], 128, 1, out, implementation) == zeros
    assert np.array_equal(out, expected)


@each_size
@each_dtype
def test_unpack_ternary(implementation: str, dtype: str, numel: int) -> None:
    planes = np.random.default_rng(numel).integers(0, 2**32, (2, num_words(numel)), dtype=np.uint32)
    sign = 1 << (np.dtype(BITS[dtype]).itemsize * 8 - 1)
    ternary = reference.ternary_of(planes, numel)
    for positive in map(int, special(dtype).view(BITS[dtype])[::3]):
        signs = np.where(ternary > 0, BITS[dtype](positive), BITS[dtype](positive ^ sign))
        expected = np.where(ternary == 0, BITS[dtype](0), signs)
        offset = positive % 4
        out = Guarded(numel, STORED[dtype], offset)
        source = placed(planes.reshape(-1), offset).reshape(planes.shape)
        _core.unpack_ternary(source, numel, dtype, positive, out.array, implementation)
        assert np.array_equal(out.array.view(BITS[dtype]), expected)
        assert out.guards_hold()


def test_threads_change_nothing(implementation: str) -> None:
    numel = 4_000_001
    rng = np.random.default_rng(0)
    x = [rng.standard_normal(numel).astype(np.float32) for _ in range(3)]
    results: list[list[NDArray[Any]]] = []
    for num_threads in (1, 2, 3, 8):
        chosen: dict[str, Any] = {"implementation": implementation, "num_threads": num_threads}
        stack = np.stack([signvote.pack_ternary(worker, threshold=0.6, **chosen) for worker in x])
        planes = signvote.majority_vote_ternary(stack, quorum=2, numel=numel, **chosen)
        results.append([stack, planes, signvote.unpack_ternary(planes, numel, **chosen)])
    for result in results[1:]:
        for array, expected in zip(result, results[0], strict=True):
            assert np.array_equal(array, expected)
