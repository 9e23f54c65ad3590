"""Arguments of the ops: their kind, dtype and device, and what of them the native modules are given.

That is NumPy arrays on the CPU and tensors on CUDA devices. The native modules check the rest.
"""

from __future__ import annotations

import functools
import math
import operator
import struct
from collections.abc import Callable
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from signvote import cuda

AnyArray: TypeAlias = NDArray[Any] | torch.Tensor

TORCH_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
TORCH_DTYPES_BY_NAME = {name: dtype for dtype, name in TORCH_DTYPES.items()}
NUMPY_DTYPES = {np.dtype(name): name for name in ("float32", "float64", "float16")}
DTYPES = "float32, float64, float16 or bfloat16"


def scale_bits(op: str, scale: SupportsFloat, dtype: str) -> int:
    """The bits of ``scale``, rounded to the nearest value of ``dtype``."""
    try:
        value = float(scale)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: scale is {scale!r}, expected a number") from None
    bits = _FINITE_BITS[dtype](value) if math.isfinite(value) else None
    if bits is None:
        raise ValueError(f"{op}: scale is {value!r}, expected a number that is finite in {dtype}")
    return bits


def _struct_bits(float_format: str, int_format: str, value: float) -> int | None:
    try:
        return int(struct.unpack(int_format, struct.pack(float_format, value))[0])
    except OverflowError:
        return None


def _bfloat16_bits(value: float) -> int | None:
    """The upper half of the float32, rounded half to even."""
    bits = _struct_bits("<f", "<I", value)
    if bits is None:
        return None
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return None if bits & 0x7FFF == 0x7F80 else bits


_FINITE_BITS: dict[str, Callable[[float], int | None]] = {
    "float32": functools.partial(_struct_bits, "<f", "<I"),
    "float64": functools.partial(_struct_bits, "<d", "<Q"),
    "float16": functools.partial(_struct_bits, "<e", "<H"),
    "bfloat16": _bfloat16_bits,
}


def threshold_bits(op: str, threshold: SupportsFloat, dtype: str) -> int:
    """The bits of the largest value of ``dtype`` that is not above ``threshold``: what is above one is above both."""
    try:
        value = float(threshold)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: threshold is {threshold!r}, expected a number") from None
    if not value >= 0:
        raise ValueError(f"{op}: threshold is {value!r}, expected a number that is not negative")
    if math.isinf(value):
        return _INFINITY[dtype]
    nearest = _FINITE_BITS[dtype](abs(value))
    if nearest is None:
        return _INFINITY[dtype] - 1
    return nearest - 1 if _value_of(nearest, dtype) > value else nearest


def _value_of(bits: int, dtype: str) -> float:
    if dtype == "bfloat16":
        bits, dtype = bits << 16, "float32"
    float_format, int_format = {"float32": ("<f", "<I"), "float64": ("<d", "<Q"), "float16": ("<e", "<H")}[dtype]
    return float(struct.unpack(float_format, struct.pack(int_format, bits))[0])


_INFINITY = {"float32": 0x7F800000, "float64": 0x7FF0000000000000, "float16": 0x7C00, "bfloat16": 0x7F80}


def to_integer(op: str, name: str, value: SupportsIndex, smallest: int, largest: int) -> int:
    """``value`` as an ``int`` from ``smallest`` to ``largest``, which is one less than a power of two."""
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} is {value!r}, expected an integer") from None
    if not smallest <= integer <= largest:
        limit = f"2**{largest.bit_length()} - 1"
        raise ValueError(f"{op}: {name} is {integer}, expected an integer from {smallest} to {limit}")
    return integer


def check_same_kind(op: str, name: str, x: object, like: object) -> None:
    kind = torch.Tensor if isinstance(like, torch.Tensor) else np.ndarray
    if not isinstance(x, kind):
        expected = "a torch tensor" if kind is torch.Tensor else "a NumPy array"
        raise TypeError(f"{op}: {name} is a {type(x).__name__}, expected {expected} like the other arguments")


def to_torch_dtype(op: str, dtype: Any) -> torch.dtype:
    found = TORCH_DTYPES_BY_NAME.get(dtype) if isinstance(dtype, str) else dtype
    if isinstance(found, torch.dtype) and found in TORCH_DTYPES:
        return found
    raise TypeError(f"{op}: dtype is {dtype!r}, expected torch's {DTYPES}")


CPU = torch.device("cpu")  # this very object tells the ops that they work on the CPU


def device_of(op: str, name: str, x: object) -> torch.device:
    """Where an op works whose first argument is ``x``: on its CUDA device, or on :data:`CPU`, whatever it is."""
    if not cuda.is_on_cuda(x):
        return CPU
    cuda.module_for(op, name, x.device)
    return x.device


def size_of(x: AnyArray) -> int:
    return math.prod(x.shape)


def _has_memory(x: torch.Tensor) -> bool:
    if type(x) is torch.Tensor and not x._is_zerotensor():
        return x.data_ptr() != x.storage_offset() * x.element_size() or x.numel() == 0
    if x.numel() == 0:
        return True
    try:
        storage = x.untyped_storage()
        return storage.device == x.device and storage.data_ptr() != 0  # that of a FakeTensor is on "meta"
    except RuntimeError:  # of wrappers, DTensor for one
        return False


def _tensor_memory(op: str, name: str, x: torch.Tensor, device: torch.device, written: bool) -> torch.Tensor:
    """``x`` without autograd, after the checks that the native modules cannot make."""
    if x.layout is not torch.strided:
        raise ValueError(f"{op}: {name} has layout {x.layout}, expected a dense tensor; x.to_dense() makes one")
    if not x.is_cpu if device is CPU else x.device != device:
        raise ValueError(f"{op}: {name} is on device {x.device}, expected {device}")
    if x.is_neg():
        raise ValueError(f"{op}: {name} has its negative bit set, expected a plain tensor; x.resolve_neg() makes one")
    if not _has_memory(x):
        raise ValueError(f"{op}: {name} is a {type(x).__name__} without memory of its own, expected a plain tensor")
    if x.requires_grad:
        if written:
            raise ValueError(f"{op}: {name} requires gradients, expected a tensor outside autograd; use x.detach()")
        return x.detach()
    return x


def _to_native(x: torch.Tensor, device: torch.device) -> Any:
    return x.numpy() if device is CPU else x


def input_coordinates(
    op: str, name: str, x: AnyArray, device: torch.device = CPU, written: bool = False
) -> tuple[Any, str]:
    """The memory of ``x`` as the native module takes it, and the name of its dtype."""
    if isinstance(x, np.ndarray):
        dtype = NUMPY_DTYPES.get(x.dtype)
        if dtype is not None:
            return x, dtype
        if x.dtype.name == "bfloat16":  # ml_dtypes
            return x.view(np.uint16), "bfloat16"
        raise TypeError(f"{op}: {name} is {x.dtype}, expected {DTYPES}")
    if isinstance(x, torch.Tensor):
        dtype = TORCH_DTYPES.get(x.dtype)
        if dtype is None:
            raise TypeError(f"{op}: {name} is {x.dtype}, expected {DTYPES}")
        x = _tensor_memory(op, name, x, device, written)
        return _to_native(x.view(torch.int16) if dtype == "bfloat16" else x, device), dtype
    raise TypeError(f"{op}: {name} is a {type(x).__name__}, expected a NumPy array or a torch tensor")


def written_coordinates(op: str, name: str, x: AnyArray, device: torch.device = CPU) -> tuple[Any, str]:
    """The same of coordinates that are written to."""
    return input_coordinates(op, name, x, device, written=True)


def input_words(op: str, name: str, x: AnyArray, device: torch.device = CPU, written: bool = False) -> Any:
    """The memory of the words ``x``."""
    if isinstance(x, np.ndarray):
        return x
    if isinstance(x, torch.Tensor):
        if x.dtype is not torch.int32:
            raise TypeError(f"{op}: {name} is {x.dtype}, expected int32 words")
        return _to_native(_tensor_memory(op, name, x, device, written), device)
    raise TypeError(f"{op}: {name} is a {type(x).__name__}, expected a NumPy array or a torch tensor")


def written_words(op: str, name: str, x: AnyArray, device: torch.device = CPU) -> Any:
    """The memory of the words ``x``, which are written to."""
    return input_words(op, name, x, device, written=True)


def words_out(op: str, like: AnyArray, shape: tuple[int, ...], out: Any, device: torch.device = CPU) -> tuple[Any, Any]:
    """``out`` or new words of the kind of ``like``, and their memory."""
    if out is None:
        if isinstance(like, np.ndarray):
            words = np.empty(shape, np.uint32)
            return words, words
        tensor = torch.empty(shape, dtype=torch.int32, device=device)
        return tensor, _to_native(tensor, device)
    check_same_kind(op, "out", out, like)
    return out, written_words(op, "out", out, device)
