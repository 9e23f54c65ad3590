"""Every implementation against the reference, bit for bit, through the native module."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
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
    bit_rows,
    finite_special,
    mixture,
    placed,
    special,
    store,
    values,
    word_rows,
)
from signvote import _core

UNDECIDED = ("coin", "positive", "negative")
OFFSETS = (0, 1, 3)
SEED = 2**63 + 12345

SIGNUM = (0.9, 1 - 0.9, 0.9, 1 - 0.9)
COEFFICIENTS = {
    "signum": SIGNUM,
    "lion": (0.9, 0.1, 0.99, 0.01),
    # Of what is sent and what is kept, one coefficient is the same.
    "gradient differs": (0.9, 0.3, 0.9, -0.2),
    "momentum differs": (0.2, 0.1, -0.9, 0.1),
    "gradient": (0.0, 1.0, 0.0, 0.0),
    "sum": (1.0, 1.0, 1.0, 1.0),
    "difference": (-1.0, 1.0, 1.0, -1.0),
    "large": (1e30, 1e30, 1e30, 1e30),
    "small": (1e-30, 1e-30, 1e-30, 1e-30),
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_size = pytest.mark.parametrize("numel", SIZES)


def num_words(numel: int) -> int:
    return (numel + 31) // 32


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Equal to the last bit, -0 and 0 apart, all NaNs alike."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return bool(np.all((a.view(bits) == b.view(bits)) | (np.isnan(a) & np.isnan(b))))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists the CPU's features in /proc/cpuinfo")
def test_implementations_are_all_that_this_cpu_can_run() -> None:
    info = Path("/proc/cpuinfo").read_text()
    line = next((line for line in info.splitlines() if line.startswith(("flags", "Features"))), "")
    flags = set(line.split())
    expected = ["portable"]
    if "asimd" in flags:
        expected.insert(0, "neon")
    if {"avx2", "f16c"} <= flags:
        expected.insert(0, "avx2")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            expected.insert(0, "avx512")
    assert signvote.implementations() == expected


def test_mix() -> None:
    # The first outputs of splitmix64 with seed 1234567, as published with it.
    state = 1234567
    for expected in (6457827717110365317, 3203168211198807973, 9817491932198370423):
        assert _core.mix(state) == expected == reference.mix(state)
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    for x in (0, 1, 2**63, 2**64 - 1):
        assert _core.mix(x) == reference.mix(x)


@each_size
@each_dtype
def test_pack_signs(implementation: str, dtype: str, numel: int) -> None:
    stored = mixture(np.random.default_rng(numel), numel, dtype)
    for zeros in UNDECIDED:
        expected, *counts = reference.pack_signs(values(stored, dtype), zeros, SEED)
        for offset in OFFSETS:
            out = Guarded(num_words(numel), np.uint32, offset)
            x = placed(stored, offset)
            assert _core.pack_signs(x, dtype, zeros, SEED, out.array, implementation) == tuple(counts)
            assert np.array_equal(out.array, expected)
            assert out.guards_hold()


@each_dtype
def test_pack_signs_of_special_values(implementation: str, dtype: str) -> None:
    # Each one at each position of a vector of any width.
    stored: NDArray[Any] = np.concatenate([np.roll(special(dtype), shift) for shift in range(len(special(dtype)))])
    for zeros in UNDECIDED:
        expected, *counts = reference.pack_signs(values(stored, dtype), zeros, 7)
        out = np.empty_like(expected)
        assert _core.pack_signs(stored, dtype, zeros, 7, out, implementation) == tuple(counts)
        assert np.array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_pattern(implementation: str, dtype: str) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    stored: NDArray[Any] = patterns.view(STORED[dtype])
    floats = values(stored, dtype)
    expected, *counts = reference.pack_signs(floats, "coin", SEED)
    out = np.empty_like(expected)
    assert _core.pack_signs(stored, dtype, "coin", SEED, out, implementation) == tuple(counts)
    assert np.array_equal(out, expected)

    momentum = np.random.default_rng(0).standard_normal(2**16).astype(np.float32) * 1e-4
    expected, kept, *counts = reference.pack_momentum(floats, momentum, SIGNUM, "coin", SEED)
    assert _core.pack_momentum(stored, dtype, momentum, SIGNUM, "coin", SEED, out, implementation) == tuple(counts)
    assert np.array_equal(out, expected)
    assert same_bits(momentum, kept)

    found = [_core.has_nonfinite(stored[i : i + 1], dtype, implementation) for i in range(2**16)]
    assert np.array_equal(found, ~np.isfinite(floats))


@each_dtype
def test_float_environment_changes_nothing(implementation: str, dtype: str) -> None:
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU cannot flush subnormal numbers")
    stored = np.tile(finite_special(dtype), 7)
    floats = values(stored, dtype)
    momentum = np.zeros(stored.size, np.float64 if dtype == "float64" else np.float32)
    momentum[::3] = np.finfo(momentum.dtype).smallest_subnormal * 1000
    packed = reference.pack_signs(floats, "coin", SEED)
    sent = {
        name: reference.pack_momentum(floats, momentum, coefficients, "coin", SEED)
        for name, coefficients in COEFFICIENTS.items()
    }
    out = np.empty_like(packed[0])
    torch.set_flush_denormal(True)
    try:
        counts = _core.pack_signs(stored, dtype, "coin", SEED, out, implementation)
        results = {}
        for name, coefficients in COEFFICIENTS.items():
            kept, words = momentum.copy(), np.empty_like(out)
            found = _core.pack_momentum(stored, dtype, kept, coefficients, "coin", SEED, words, implementation)
            results[name] = words, kept, *found
    finally:
        torch.set_flush_denormal(False)
    assert counts == packed[1:]
    assert np.array_equal(out, packed[0])
    for name, (words, kept, *undecided) in results.items():
        assert np.array_equal(words, sent[name][0]), name
        assert same_bits(kept, sent[name][1]), name
        assert tuple(undecided) == sent[name][2:], name


@each_size
@each_dtype
def test_pack_momentum(implementation: str, dtype: str, numel: int) -> None:
    rng = np.random.default_rng(numel)
    stored = mixture(rng, numel, dtype)
    momentum_dtype = "float64" if dtype == "float64" else "float32"
    start = mixture(rng, numel, momentum_dtype, finite=True)
    # Sums that cancel, some of them to the last bit.
    cancelling = rng.integers(0, 4, numel) == 0
    start[cancelling] = -values(stored, dtype)[cancelling]
    start[~np.isfinite(start)] = 1
    for name, coefficients in COEFFICIENTS.items():
        for zeros in UNDECIDED if name == "difference" else ("coin",):
            expected, kept, *counts = reference.pack_momentum(values(stored, dtype), start, coefficients, zeros, SEED)
            for offset in OFFSETS:
                out = Guarded(num_words(numel), np.uint32, offset)
                momentum = Guarded(numel, start.dtype, offset)
                momentum.array[:] = start
                x = placed(stored, offset)
                found = _core.pack_momentum(
                    x, dtype, momentum.array, coefficients, zeros, SEED, out.array, implementation
                )
                assert found == tuple(counts), name
                assert np.array_equal(out.array, expected), name
                assert same_bits(momentum.array, kept), name
                assert out.guards_hold()
                assert momentum.guards_hold()


@each_dtype
def test_pack_momentum_is_not_fused(implementation: str, dtype: str) -> None:
    # With so many coordinates a product and a sum rounded once would differ somewhere.
    rng = np.random.default_rng(1)
    stored = store(rng.standard_normal(20_000), dtype)
    momentum = rng.standard_normal(20_000).astype(np.float64 if dtype == "float64" else np.float32)
    expected, kept, *counts = reference.pack_momentum(values(stored, dtype), momentum, SIGNUM)
    out = np.empty_like(expected)
    assert _core.pack_momentum(stored, dtype, momentum, SIGNUM, "coin", 0, out, implementation) == tuple(counts)
    assert np.array_equal(out, expected)
    assert same_bits(momentum, kept)


@each_dtype
def test_pack_momentum_of_nonfinite_momentum(implementation: str, dtype: str) -> None:
    momentum = np.tile(special("float64" if dtype == "float64" else "float32"), 5)
    stored = np.resize(store(np.array([-2.0, 0.0, 1.0]), dtype), momentum.size)
    expected, kept, *counts = reference.pack_momentum(values(stored, dtype), momentum, SIGNUM)
    out = np.empty_like(expected)
    assert _core.pack_momentum(stored, dtype, momentum, SIGNUM, "coin", 0, out, implementation) == tuple(counts)
    assert np.array_equal(out, expected)
    assert same_bits(momentum, kept)


@each_dtype
def test_momentum_without_gradient_dies(implementation: str, dtype: str) -> None:
    momentum = np.array([1e-30, -1e-30] * 40, np.float64 if dtype == "float64" else np.float32)
    stored: NDArray[Any] = np.zeros(80, STORED[dtype])
    out = np.empty(3, np.uint32)
    zeros = 0
    for _ in range(300 if dtype != "float64" else 20_000):
        zeros, _ = _core.pack_momentum(stored, dtype, momentum, SIGNUM, "coin", 0, out, implementation)
    assert zeros == 80
    assert not momentum.any()


@each_size
@each_dtype
def test_has_nonfinite(implementation: str, dtype: str, numel: int) -> None:
    finite = mixture(np.random.default_rng(numel), numel, dtype, finite=True)
    everywhere = range(numel) if numel <= 257 else range(numel - 66, numel)
    for offset in OFFSETS:
        x = placed(finite, offset)
        assert _core.has_nonfinite(x, dtype, implementation) is False
    # Nor may it look beyond the end.
    largest = np.array([np.inf, -np.inf, np.nan])
    around = np.concatenate([store(largest, dtype), finite, store(largest, dtype)])
    assert _core.has_nonfinite(around[3 : 3 + numel], dtype, implementation) is False
    for i in everywhere:
        x = finite.copy()
        x[i] = store(largest, dtype)[i % 3]
        assert _core.has_nonfinite(x, dtype, implementation) is True, i


@functools.cache
def vote_case(num_rows: int, numel: int) -> list[tuple[NDArray[np.uint32], dict[str, tuple[NDArray[np.uint32], int]]]]:
    """Rows of words, and what to expect for each ``ties``."""
    cases = []
    for bits in bit_rows(np.random.default_rng(num_rows), num_rows, numel):
        rows = word_rows(bits, unused=True)
        cases.append((rows, {ties: reference.majority_vote(rows, numel, ties, SEED) for ties in UNDECIDED}))
    return cases


def check_votes(implementation: str, num_rows: int, numel: int) -> None:
    for rows, expected in vote_case(num_rows, numel):
        for ties, (words, tied) in expected.items():
            out = Guarded(num_words(numel), np.uint32, num_rows % 4)
            assert _core.majority_vote(rows, numel, ties, SEED, out.array, implementation) == tied
            assert np.array_equal(out.array, words)
            assert out.guards_hold()


@pytest.mark.parametrize("num_rows", [*range(1, 34), 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 1023])
def test_majority_vote_of_rows(implementation: str, num_rows: int) -> None:
    for numel in (0, 1, 31, 33, 64, 65, 600):
        check_votes(implementation, num_rows, numel)


@each_size
def test_majority_vote_of_sizes(implementation: str, numel: int) -> None:
    for num_rows in (1, 2, 3, 4, 7, 8, 9):
        check_votes(implementation, num_rows, numel)


def test_majority_vote_of_many_words(implementation: str) -> None:
    # More words than one tile of counters holds.
    check_votes(implementation, 20, 300_001)


@pytest.mark.parametrize("num_rows", [65534, 65535])
def test_majority_vote_of_most_rows(implementation: str, num_rows: int) -> None:
    # Every count near the threshold, and none and all; column i is set in the first counts[i] rows.
    counts = np.array([0, 1, 2, 32766, 32767, 32768, 32769, 65533, num_rows] * 8)
    bits = np.arange(num_rows)[:, None] < counts
    rows = word_rows(bits, unused=False)
    undecided = reference.coins(SEED, counts.size)
    expected = reference.words_of(np.where(2 * counts == num_rows, undecided, 2 * counts > num_rows))
    out = np.empty_like(expected)
    tied = _core.majority_vote(rows, counts.size, "coin", SEED, out, implementation)
    assert tied == np.sum(2 * counts == num_rows)
    assert np.array_equal(out, expected)


def test_majority_vote_of_strided_rows(implementation: str) -> None:
    rng = np.random.default_rng(3)
    wide = rng.integers(0, 2**32, (6, 13), dtype=np.uint32)
    for stack in (wide[:, 2:9], wide[::-1, 1:8], wide[::2, :7], np.broadcast_to(wide[0, 3:10], (4, 7)), wide[:1, :7]):
        expected, tied = reference.majority_vote(stack, 220, "coin", 1)
        out = np.empty(7, np.uint32)
        assert _core.majority_vote(stack, 220, "coin", 1, out, implementation) == tied
        assert np.array_equal(out, expected)
        assert _core.majority_vote(list(stack), 220, "coin", 1, out, implementation) == tied
        assert np.array_equal(out, expected)
    # Between the rows there is room for the result.
    out = wide[2, 9:]
    expected, tied = reference.majority_vote(wide[:, :4], 128, "coin", 1)
    assert _core.majority_vote(wide[:, :4], 128, "coin", 1, out, implementation) == tied
    assert np.array_equal(out, expected)


@each_size
@each_dtype
def test_unpack_signs(implementation: str, dtype: str, numel: int) -> None:
    words = np.random.default_rng(numel).integers(0, 2**32, num_words(numel), dtype=np.uint32)
    sign = 1 << (np.dtype(BITS[dtype]).itemsize * 8 - 1)
    ones = reference.bits_of(words, numel)
    for positive in map(int, special(dtype).view(BITS[dtype])[::3]):
        expected = np.where(ones, BITS[dtype](positive), BITS[dtype](positive ^ sign))
        offset = positive % 4
        out = Guarded(numel, STORED[dtype], offset)
        _core.unpack_signs(placed(words, offset), numel, dtype, positive, out.array, implementation)
        assert np.array_equal(out.array.view(BITS[dtype]), expected)
        assert out.guards_hold()


def test_words_are_little_endian_bits(implementation: str) -> None:
    if sys.byteorder != "little":
        pytest.skip("the bytes are those of packbits on little-endian machines")
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    words = signvote.pack_signs(x, implementation=implementation)
    assert words.tobytes()[:125] == np.packbits(x > 0, bitorder="little").tobytes()
