"""What the ops must give, by NumPy's own packbits, unpackbits and sums: a result is checked before it is timed.

All sizes are whole words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

# A vote on more than this many bits is checked at both ends and in WINDOWS places between them, not as a whole.
WHOLE_VOTE = 1 << 24
WINDOWS = 6
BLOCK = 1 << 18  # coordinates at a time, so that what lies between stays in the cache


class WrongResultError(Exception):
    """An op or a peer gave something else than its definition."""


def check_equal(label: str, got: NDArray[Any], expected: NDArray[Any]) -> None:
    """Bit for bit."""
    got, expected = (array.view(f"u{array.itemsize}") for array in (got, expected))
    if not np.array_equal(got, expected):
        wrong = np.flatnonzero(got != expected)
        raise WrongResultError(f"{label}: {wrong.size} of {expected.size} items are wrong, the first at {wrong[0]}")


def to_float32(x: NDArray[Any]) -> NDArray[Any]:
    """bfloat16, which NumPy does not have, as float32; all else as it is."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def pack_bits(bits: NDArray[Any]) -> Words:
    return np.packbits(bits, bitorder="little").view(np.uint32)


def unpack_bits(words: Words, numel: int) -> NDArray[np.uint8]:
    return np.unpackbits(words.view(np.uint8), axis=-1, count=numel, bitorder="little")


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of splitmix64."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def coin_words(seed: int, first: int, count: int) -> Words:
    """Coins of ``count`` words from word ``first`` on, which is even."""
    blocks = np.arange(first // 2, first // 2 + (count + 1) // 2, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return mix(mix(np.array([seed], np.uint64)) + blocks).view(np.uint32)[:count]


def pack_signs(x: NDArray[Any], seed: int | None) -> Words:
    """Zeros are coins, or 0 without a seed."""
    words = np.empty(x.size // 32, np.uint32)
    for begin in range(0, x.size, BLOCK):
        part = to_float32(x[begin : begin + BLOCK])
        block = words[begin // 32 : (begin + BLOCK) // 32]
        block[:] = pack_bits(part > 0)
        zero = part == 0
        if seed is not None and zero.any():
            block |= pack_bits(zero) & coin_words(seed, begin // 32, block.size)
    return words


def momentum(x: NDArray[Any], m: NDArray[Any], beta: float) -> NDArray[Any]:
    """Signum's, which sends what it keeps; no value is so small that it is flushed to zero."""
    kept = np.empty_like(m)
    kind = m.dtype.type
    for begin in range(0, x.size, BLOCK):
        block = slice(begin, begin + BLOCK)
        kept[block] = kind(beta) * m[block] + kind(1 - beta) * to_float32(x[block]).astype(m.dtype)
    return kept


def check_unpacked(label: str, got: NDArray[Any], words: Words, scale: float) -> None:
    """``got`` may be the bits of bfloat16."""
    if got.dtype == np.uint16:
        values = (np.array([-scale, scale], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        values = np.array([-scale, scale], got.dtype)
    for begin in range(0, got.size, BLOCK):
        part = got[begin : begin + BLOCK]
        right = values[unpack_bits(words[begin // 32 : (begin + BLOCK) // 32], part.size)]
        check_equal(f"{label}, from coordinate {begin} on", part, right)


def pack_ternary(x: NDArray[Any], threshold: float) -> Words:
    """Of finite coordinates, and a threshold that their dtype holds: the planes sign and active."""
    planes = np.empty((2, x.size // 32), np.uint32)
    for begin in range(0, x.size, BLOCK):
        part = to_float32(x[begin : begin + BLOCK])
        block = planes[:, begin // 32 : (begin + BLOCK) // 32]
        block[0], block[1] = pack_bits(part > threshold), pack_bits(abs(part) > threshold)
    return planes


def unpack_ternary(stack: NDArray[np.uint32], numel: int) -> NDArray[np.int8]:
    """1, -1 or 0 per coordinate of each of a stack of planes."""
    sign, active = (unpack_bits(np.ascontiguousarray(stack[:, plane]), numel).view(np.int8) for plane in (0, 1))
    return (2 * sign - 1) * active


def check_unpacked_ternary(label: str, got: NDArray[Any], planes: Words, scale: float) -> None:
    """``got`` may be the bits of bfloat16."""
    values = np.array([0, 0, -scale, scale], np.float32 if got.dtype == np.uint16 else got.dtype)
    if got.dtype == np.uint16:
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    for begin in range(0, got.size, BLOCK):
        part = got[begin : begin + BLOCK]
        sign, active = (unpack_bits(plane[begin // 32 : (begin + BLOCK) // 32], part.size) for plane in planes)
        check_equal(f"{label}, from coordinate {begin} on", part, values[2 * active + sign])


def check_vote_ternary(label: str, got: Words, stack: NDArray[np.uint32], numel: int, quorum: int) -> None:
    num_rows, _, num_words = stack.shape
    for first, count in _windows(2 * num_rows, numel, num_words):
        bits = min(32 * count, numel - 32 * first)
        lead = np.zeros(bits, np.int32)
        for sign, active in stack[:, :, first : first + count]:
            lead += unpack_bits(active, bits) * (2 * unpack_bits(sign, bits).astype(np.int8) - 1)
        right = np.stack([pack_bits(lead >= quorum), pack_bits(abs(lead) >= quorum)])
        check_equal(label, np.ascontiguousarray(got[:, first : first + count]).reshape(-1), right.reshape(-1))


def _windows(num_rows: int, numel: int, num_words: int) -> list[tuple[int, int]]:
    """What of a vote is checked: the first words and how many, of which the last reach the end."""
    if num_rows * numel <= WHOLE_VOTE:
        return [(0, num_words)]
    size = WHOLE_VOTE // (32 * num_rows * (WINDOWS + 2)) & ~1
    places = np.linspace(0, num_words - size, WINDOWS + 2).astype(int) & ~1
    return [*((int(place), size) for place in places[:-1]), (int(places[-1]), num_words - int(places[-1]))]


def check_vote(label: str, got: Words, rows: NDArray[np.uint32], numel: int, seed: int | None) -> None:
    """Ties are coins, or 0 without a seed."""
    num_rows, num_words = rows.shape
    for first, count in _windows(num_rows, numel, num_words):
        bits = min(32 * count, numel - 32 * first)
        votes = unpack_bits(np.ascontiguousarray(rows[:, first : first + count]), bits).sum(axis=0, dtype=np.int32)
        majority, tie = pack_bits(2 * votes > num_rows), pack_bits(2 * votes == num_rows)
        right = majority if seed is None else majority | tie & coin_words(seed, first, count)
        check_equal(label, got[first : first + count], right)
