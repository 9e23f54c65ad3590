"""The data of a case: random gradients and words, in memory like the hook's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from signvote.cli.bench.expected import Words

CACHE_LINE = 64
GRADIENT_PERIOD = 1_000_003
BLOCK = 1 << 16  # random numbers at a time, so that they stay in the cache


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


def spoil(*outs: NDArray[Any]) -> None:
    """So that the next one cannot pass with this one's results."""
    for out in outs:
        out.view(np.uint8).fill(0xAA)
