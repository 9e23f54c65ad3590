"""Coordinates to try the ops on, and memory that shows who wrote where.

The native module takes bfloat16 as 16-bit integers, the reference as float32. So coordinates are *stored*, an array of
``STORED[dtype]``, and have *values*, an array of floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode

DTYPES = ("float32", "float64", "float16", "bfloat16")
STORED: dict[str, type] = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": np.uint16}
BITS: dict[str, type] = {"float32": np.uint32, "float64": np.uint64, "float16": np.uint16, "bfloat16": np.uint16}
EXPONENT_BITS = {"float32": 8, "float64": 11, "float16": 5, "bfloat16": 8}

# Around every boundary: of words, of coin blocks, and of registers of all widths.
SIZES = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193]
SIZES += [255, 256, 257, 511, 512, 513, 1023, 1025, 2049, 4097]

GUARD = 0xA5


def values(stored: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The floats that the stored coordinates stand for."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored


def store(floats: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Stored coordinates near the given floats."""
    if dtype == "bfloat16":
        return (floats.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return floats.astype(STORED[dtype])


def special(dtype: str) -> NDArray[Any]:
    """Both signs of zeros, subnormals, the smallest and largest normals, one, infinities and NaNs."""
    width = np.dtype(BITS[dtype]).itemsize * 8
    mantissa_bits = width - 1 - EXPONENT_BITS[dtype]
    largest = 2 ** EXPONENT_BITS[dtype] - 1
    bits = [
        sign << (width - 1) | exponent << mantissa_bits | mantissa
        for sign in (0, 1)
        for exponent in (0, 1, largest // 2, largest - 1, largest)
        for mantissa in (0, 1, 2 ** (mantissa_bits - 1), 2**mantissa_bits - 1)
    ]
    return np.array(bits, BITS[dtype]).view(STORED[dtype])


def finite_special(dtype: str) -> NDArray[Any]:
    stored = special(dtype)
    return stored[np.isfinite(values(stored, dtype))]


def mixture(rng: np.random.Generator, numel: int, dtype: str, finite: bool = False) -> NDArray[Any]:
    """Stored coordinates: noise, a tenth of zeros, and a tenth of special values."""
    stored = store(rng.standard_normal(numel), dtype)
    kind = rng.integers(0, 10, numel)
    stored[kind == 0] = 0
    extremes = finite_special(dtype) if finite else special(dtype)
    return np.where(kind == 1, rng.choice(extremes, numel), stored)


class WrapperTensor(torch.Tensor):
    """As a DTensor is one."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError


def without_memory(dtype: torch.dtype, numel: int, device: torch.device | None = None) -> Iterator[torch.Tensor]:
    """Tensors that have coordinates but no address: fake, a wrapper, zeros of autograd's, with their storage freed."""
    with FakeTensorMode():
        fake = torch.empty(numel, dtype=dtype, device=device)
    yield fake
    yield torch.Tensor._make_wrapper_subclass(WrapperTensor, (numel,), dtype=dtype, device=device)
    yield torch._efficientzerotensor((numel,), dtype=dtype, device=device)
    freed = torch.empty(numel, dtype=dtype, device=device)
    freed.untyped_storage().resize_(0)
    yield freed


class Guarded:
    """An array that starts ``offset`` items after a multiple of 64 bytes, between guard bytes."""

    def __init__(self, numel: int, dtype: Any, offset: int) -> None:
        itemsize = np.dtype(dtype).itemsize
        self._bytes = np.full(numel * itemsize + 512, GUARD, np.uint8)
        self._begin = -self._bytes.ctypes.data % 64 + 128 + offset * itemsize
        self._end = self._begin + numel * itemsize
        self.array = self._bytes[self._begin : self._end].view(dtype)

    def guards_hold(self) -> bool:
        return bool(np.all(self._bytes[: self._begin] == GUARD) and np.all(self._bytes[self._end :] == GUARD))

    def untouched(self) -> bool:
        return bool(np.all(self._bytes == GUARD))


def placed(array: NDArray[Any], offset: int) -> NDArray[Any]:
    """A read-only copy that starts ``offset`` items after a multiple of 64 bytes."""
    copy = Guarded(array.size, array.dtype, offset).array
    copy[:] = array
    copy.flags.writeable = False
    return copy


def bit_rows(rng: np.random.Generator, num_rows: int, numel: int) -> Iterator[NDArray[np.bool_]]:
    """Bits of ``num_rows`` workers: every count of + from 0 to M in turn, then counts near a tie, in random order."""
    count = np.arange(numel) % (num_rows + 1)
    near = (num_rows // 2 + np.arange(numel) % 3 - 1).clip(0, num_rows)
    for counts in (count, near):
        order = rng.permuted(np.tile(np.arange(num_rows)[:, None], (1, numel)), axis=0)
        yield order < counts


def word_rows(bits: NDArray[np.bool_], unused: bool) -> NDArray[np.uint32]:
    """Rows of bits as rows of words, with ``unused`` in the unused bits."""
    num_rows, numel = bits.shape
    padded = np.full((num_rows, (numel + 31) // 32 * 32), unused)
    padded[:, :numel] = bits
    return np.packbits(padded, axis=1, bitorder="little").view("<u4").astype(np.uint32)


def ternary_rows(rng: np.random.Generator, num_rows: int, numel: int) -> NDArray[np.uint32]:
    """Ballots of ``num_rows`` workers, ``(M, 2, W)``: every lead from -M to M in turn, or one near 0, of few or many.

    Where a ballot is not active its sign is any bit, and so are the unused bits.
    """
    i = np.arange(numel)
    near, far = i % 7 - 3, i % (2 * num_rows + 1) - num_rows
    lead = np.where(rng.integers(0, 2, numel) == 0, near, far).clip(-num_rows, num_rows)
    pairs = ((num_rows - abs(lead)) // 2).astype(np.int64)
    minus = rng.integers(0, pairs + 1) + np.maximum(-lead, 0)
    plus = minus + lead
    order = rng.permuted(np.tile(np.arange(num_rows)[:, None], (1, numel)), axis=0)
    active = order < plus + minus
    sign = np.where(active, order < plus, rng.integers(0, 2, order.shape) == 1)
    return np.stack([word_rows(plane, unused=bool(rng.integers(0, 2))) for plane in (sign, active)], axis=1)
