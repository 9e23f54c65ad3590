"""The definition of every op in NumPy: slow and, it is hoped, obviously right. Only tests import it.

Coordinates come as float arrays; bfloat16 ones as float32, which holds every one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]
Words = NDArray[np.uint32]
Bits = NDArray[np.bool_]


def mix(x: int) -> int:
    """One step of splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def coin(seed: int, i: int) -> int:
    return mix((mix(seed) + i // 64) % 2**64) >> (i % 64) & 1


def coins(seed: int, numel: int, first: int = 0) -> Bits:
    """The coins of coordinates ``first`` to ``first + numel``, where ``first`` is a multiple of 64."""
    assert first % 64 == 0
    start = mix(seed) + first // 64
    blocks = np.array([mix((start + k) % 2**64) for k in range((numel + 63) // 64)], np.uint64)
    return (blocks[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).astype(bool).reshape(-1)[:numel]


def words_of(bits: Bits) -> Words:
    """Coordinate ``i`` is bit ``i % 32`` of word ``i // 32``; the unused bits of the last word are 0."""
    padded = np.zeros((len(bits) + 31) // 32 * 32, np.uint32)
    padded[: len(bits)] = bits
    return (padded.reshape(-1, 32) << np.arange(32, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)


def bits_of(words: Words, numel: int) -> Bits:
    i = np.arange(numel)
    return (words[i // 32] >> (i % 32).astype(np.uint32) & np.uint32(1)).astype(bool)


def decided(undecided: str, seed: int, numel: int, first: int = 0) -> Bits:
    """The bits that coordinates without a sign, or votes without a majority, take."""
    if undecided == "coin":
        return coins(seed, numel, first)
    return np.full(numel, {"positive": True, "negative": False}[undecided])


def pack_signs(x: Floats, zeros: str = "coin", seed: int = 0, first: int = 0) -> tuple[Words, int, int]:
    """The words, how many coordinates are zero, and how many are not finite."""
    x = x.reshape(-1)
    bits = np.where(x == 0, decided(zeros, seed, x.size, first), x > 0)
    return words_of(bits), int(np.sum(x == 0)), int(np.sum(~np.isfinite(x)))


def flush(x: Floats) -> Floats:
    """0 for what is smaller than the smallest normal number."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.zeros_like(x), x)


def pack_momentum(
    x: Floats, momentum: Floats, coefficients: Sequence[float], zeros: str = "coin", seed: int = 0, first: int = 0
) -> tuple[Words, Floats, int, int]:
    """The words, the new momentum, how many coordinates were undecided, and how many were not finite.

    Not finite are those where ``x`` is not, or what is to be sent.
    """
    m = momentum.reshape(-1)
    g = x.reshape(-1).astype(m.dtype)
    send_momentum, send_gradient, keep_momentum, keep_gradient = (m.dtype.type(value) for value in coefficients)
    finite = np.isfinite(g)
    with np.errstate(all="ignore"):
        sent = flush(np.where(finite, send_momentum * m + send_gradient * g, send_momentum * m))
        kept = np.where(finite, flush(keep_momentum * m + keep_gradient * g), m)
    words, undecided, _ = pack_signs(sent, zeros, seed, first)
    return words, kept.reshape(momentum.shape), undecided, int(np.sum(~finite | ~np.isfinite(sent)))


def has_nonfinite(x: Floats) -> bool:
    return not bool(np.all(np.isfinite(x)))


def majority_vote(
    stack: Iterable[Words], numel: int, ties: str = "coin", seed: int = 0, first: int = 0
) -> tuple[Words, int]:
    """The words, and how many coordinates were tied."""
    votes = np.array([np.where(bits_of(row, numel), 1, -1) for row in stack]).sum(axis=0)
    bits = np.where(votes == 0, decided(ties, seed, numel, first), votes > 0)
    return words_of(bits), int(np.sum(votes == 0))


def counts(votes: Iterable[tuple[Words, int]], numel: int) -> NDArray[np.int64]:
    """How many votes are 1, per coordinate, each vote counting as often as its weight says."""
    total = np.zeros(numel, np.int64)
    for words, weight in votes:
        total += weight * bits_of(words, numel)
    return total


def decide(
    counts: NDArray[np.int64], num_votes: int, ties: str = "coin", seed: int = 0, first: int = 0
) -> tuple[Words, int]:
    """The words, and how many coordinates were tied."""
    lead = 2 * counts - num_votes
    bits = np.where(lead == 0, decided(ties, seed, counts.size, first), lead > 0)
    return words_of(bits), int(np.sum(lead == 0))


def decide_ternary(counts: NDArray[np.int64], num_votes: int, quorum: int) -> Words:
    """The planes sign and active."""
    lead = 2 * counts - num_votes
    result = np.where(abs(lead) < quorum, 0, lead)
    return planes_of(result)


def unpack_signs(words: Words, numel: int, scale: Any) -> Floats:
    """In the dtype of ``scale``."""
    return np.where(bits_of(words, numel), scale, -scale)


def ternary_of(planes: Words, numel: int) -> NDArray[np.int64]:
    """1, 0 or -1 per coordinate; the sign of a coordinate that is not active means nothing."""
    sign, active = planes
    return np.where(bits_of(active, numel), np.where(bits_of(sign, numel), 1, -1), 0)


def planes_of(values: NDArray[Any]) -> Words:
    """The planes sign and active."""
    return np.stack([words_of(values > 0), words_of(values != 0)])


def pack_ternary(x: Floats, threshold: float = 0.0) -> tuple[Words, int, int]:
    """The planes, how many coordinates abstain because of the threshold, and how many are not finite.

    They are compared as real numbers: the threshold is not rounded to the dtype of ``x``. NaN abstains too.
    """
    with np.errstate(invalid="ignore"):  # of signaling NaN
        x = x.reshape(-1).astype(np.float64)
    active = abs(x) > threshold
    abstained = ~active & ~np.isnan(x)
    planes = np.stack([words_of(active & (x > 0)), words_of(active)])
    return planes, int(np.sum(abstained)), int(np.sum(~np.isfinite(x)))


def majority_vote_ternary(stack: Iterable[Words], numel: int, quorum: int = 1) -> tuple[Words, int]:
    """The planes, and how many coordinates are 0."""
    lead = np.array([ternary_of(planes, numel) for planes in stack]).sum(axis=0)
    result = np.where(abs(lead) < quorum, 0, lead)
    return planes_of(result), int(np.sum(result == 0))


def unpack_ternary(planes: Words, numel: int, scale: Any) -> Floats:
    """In the dtype of ``scale``."""
    values = ternary_of(planes, numel)
    return np.where(values == 0, type(scale)(0), np.where(values > 0, scale, -scale))


def run_seed(seed: int, place: int) -> int:
    return mix((seed + place) % 2**64)


def pack_runs(
    bucket: Floats,
    momentum: Floats | None,
    coefficients: Sequence[float],
    runs: NDArray[np.int64],
    out: Words,
    zeros: str,
    seed: int,
) -> tuple[int, int]:
    """Writes to ``out`` and ``momentum``; how many coordinates were undecided, and how many were not finite."""
    total_undecided = total_nonfinite = 0
    for place, first, numel, coordinate, word in runs.tolist():
        x = bucket[coordinate : coordinate + numel]
        if momentum is None:
            words, undecided, nonfinite = pack_signs(x, zeros, run_seed(seed, place), first)
        else:
            m = momentum[coordinate : coordinate + numel]
            words, m[:], undecided, nonfinite = pack_momentum(x, m, coefficients, zeros, run_seed(seed, place), first)
        out[word : word + len(words)] = words
        total_undecided += undecided
        total_nonfinite += nonfinite
    return total_undecided, total_nonfinite


def vote_runs(rows: Sequence[Words], runs: NDArray[np.int64], out: Words, ties: str, seed: int) -> int:
    """Writes to ``out``; how many coordinates were tied."""
    total = 0
    for place, first, numel, _, word in runs.tolist():
        end = word + (numel + 31) // 32
        out[word:end], tied = majority_vote([row[word:end] for row in rows], numel, ties, run_seed(seed, place), first)
        total += tied
    return total


def unpack_runs(words: Words, runs: NDArray[np.int64], bucket: Floats, scale: Any) -> None:
    """Writes to ``bucket``."""
    for _, _, numel, coordinate, word in runs.tolist():
        bucket[coordinate : coordinate + numel] = unpack_signs(words[word:], numel, scale)


def planes_in(words: Words, word: int, numel: int, stride: int) -> Words:
    """The planes of a run, of which ``active`` lies ``stride`` words behind ``sign``."""
    width = (numel + 31) // 32
    return np.stack([words[word : word + width], words[word + stride : word + stride + width]])


def put_planes(words: Words, word: int, planes: Words, stride: int) -> None:
    for i, plane in enumerate(planes):
        words[word + i * stride : word + i * stride + len(plane)] = plane


def pack_ternary_runs(
    bucket: Floats, runs: NDArray[np.int64], out: Words, stride: int, threshold: float
) -> tuple[int, int]:
    """Writes to ``out``; how many coordinates abstain because of the threshold, and how many are not finite."""
    total_abstained = total_nonfinite = 0
    for _, _, numel, coordinate, word in runs.tolist():
        planes, abstained, nonfinite = pack_ternary(bucket[coordinate : coordinate + numel], threshold)
        put_planes(out, word, planes, stride)
        total_abstained += abstained
        total_nonfinite += nonfinite
    return total_abstained, total_nonfinite


def vote_ternary_runs(rows: Sequence[Words], runs: NDArray[np.int64], out: Words, stride: int, quorum: int) -> int:
    """Writes to ``out``; how many coordinates are 0."""
    total = 0
    for _, _, numel, _, word in runs.tolist():
        stack = [planes_in(row, word, numel, stride) for row in rows]
        planes, zeros = majority_vote_ternary(stack, numel, quorum)
        put_planes(out, word, planes, stride)
        total += zeros
    return total


def unpack_ternary_runs(words: Words, runs: NDArray[np.int64], stride: int, bucket: Floats, scale: Any) -> None:
    """Writes to ``bucket``."""
    for _, _, numel, coordinate, word in runs.tolist():
        bucket[coordinate : coordinate + numel] = unpack_ternary(planes_in(words, word, numel, stride), numel, scale)
