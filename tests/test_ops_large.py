"""More than 2**32 coordinates."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import signvote

NUMEL = 2**32 + 77
WIDTH = 2**27 + 3
# Around the first coordinate, the 32-bit ones, and the last.
MARKED = np.array([0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 76])


def skip_without(gibibytes: int) -> None:
    info = Path("/proc/meminfo")
    if not info.exists():
        pytest.skip("how much memory is free is known on Linux only")
    fields = dict(line.split(":") for line in info.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) / 2**20
    if available < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of memory, {available:.1f} are available")


def marked_words() -> dict[int, int]:
    words: dict[int, int] = {}
    for i in MARKED.tolist():
        words[i // 32] = words.get(i // 32, 0) | 1 << i % 32
    return words


def assert_marked(words: NDArray[np.uint32]) -> None:
    assert words.shape == (WIDTH,)
    positions = np.flatnonzero(words)
    assert dict(zip(positions.tolist(), words[positions].tolist(), strict=True)) == marked_words()


def test_pack_signs_and_has_nonfinite() -> None:
    # Pages of zeros that are only read take no memory.
    skip_without(2)
    x = np.zeros(NUMEL, np.float16)
    x[MARKED] = 1
    assert_marked(signvote.pack_signs(x, zeros="negative"))
    assert not signvote.has_nonfinite(x)
    x[-1] = np.inf
    assert signvote.has_nonfinite(x)


def test_majority_vote() -> None:
    skip_without(3)
    row = np.zeros(WIDTH, np.uint32)
    for i, word in marked_words().items():
        row[i] = word
    assert_marked(signvote.majority_vote(np.broadcast_to(row, (3, WIDTH)), numel=NUMEL))


@contextlib.contextmanager
def repeating_memory(size: int, period: int) -> Iterator[NDArray[np.uint8]]:
    """``size`` bytes of addresses that show the same ``period`` bytes of memory again and again."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    repeats = -(-size // period)
    map_fixed, no_access = 0x10, 0
    base = libc.mmap(None, repeats * period, no_access, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    file = os.memfd_create("repeating_memory")
    try:
        os.ftruncate(file, period)
        for address in range(base, base + repeats * period, period):
            access = mmap.PROT_READ | mmap.PROT_WRITE
            assert libc.mmap(address, period, access, mmap.MAP_SHARED | map_fixed, file, 0) == address
        yield np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
    finally:
        os.close(file)
        libc.munmap(base, repeats * period)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux shows the same memory at many addresses")
def test_unpack_signs() -> None:
    # In fresh memory it would take 8 GiB, and most of a minute to get them. The period is a multiple of a page that
    # 2**32 coordinates are no multiple of, so that a coordinate written 2**32 too early would be seen.
    skip_without(2)
    period = 3 * 2**23
    words = np.zeros(WIDTH, np.uint32)
    words[-period // 32 - 8 :] = np.random.default_rng(0).integers(0, 2**32, period // 32 + 8, dtype=np.uint32)
    last = NUMEL // period * period
    with repeating_memory(2 * NUMEL, 2 * period) as memory:
        y: NDArray[Any] = memory.view(np.float16)
        signvote.unpack_signs(words, NUMEL, out=y)
        end = y[last:].copy()
        before = y[last - period + len(end) : last].copy()
    found = np.concatenate([before, end])
    first = NUMEL - len(found)
    bits = np.unpackbits(words[first // 32 :].view(np.uint8), bitorder="little")[first % 32 :][: len(found)]
    assert np.array_equal(found > 0, bits.astype(bool))
    assert np.all(np.abs(found) == 1)
