"""Arguments of the ops: their kind, dtype and device, and what of them the native modules are given.

That is NumPy arrays on the CPU and tensors on CUDA devices. The native modules check the rest.
"""

from __future__ import annotations

import contextlib
import math
import operator
import struct
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from signvote import cuda

AnyArray: TypeAlias = NDArray[Any] | torch.Tensor
Array = TypeVar("Array", NDArray[Any], torch.Tensor)

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
    value = _to_number(op, "scale", scale)
    bits = _finite_bits(value, dtype) if math.isfinite(value) else None
    if bits is None:
        raise ValueError(f"{op}: scale is {value!r}, expected a number that is finite in {dtype}")
    return bits


def threshold_bits(op: str, threshold: SupportsFloat, dtype: str) -> int:
    """The bits of the largest value of ``dtype`` that is not above ``threshold``: what is above one is above both."""
    value = _to_number(op, "threshold", threshold)
    if not value >= 0:
        raise ValueError(f"{op}: threshold is {value!r}, expected a number that is not negative")
    if math.isinf(value):
        return _INFINITY[dtype]
    nearest = _finite_bits(abs(value), dtype)
    if nearest is None:
        return _INFINITY[dtype] - 1
    return nearest - 1 if _value_of(nearest, dtype) > value else nearest


def _to_number(op: str, name: str, value: SupportsFloat) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} is {value!r}, expected a number") from None
    except OverflowError:  # of an integer or a fraction
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


# Of struct: a number, and its bits.
_FORMATS = {"float32": ("<f", "<I"), "float64": ("<d", "<Q"), "float16": ("<e", "<H")}

_INFINITY = {"float32": 0x7F800000, "float64": 0x7FF0000000000000, "float16": 0x7C00, "bfloat16": 0x7F80}


def _finite_bits(value: float, dtype: str) -> int | None:
    """The bits of the value of ``dtype`` nearest to a finite one; None if that is not finite."""
    if dtype == "bfloat16":  # the upper half of the float32, rounded half to even
        bits = _finite_bits(value, "float32")
        if bits is None:
            return None
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return None if bits & 0x7FFF == _INFINITY[dtype] else bits
    float_format, int_format = _FORMATS[dtype]
    try:
        return int(struct.unpack(int_format, struct.pack(float_format, value))[0])
    except OverflowError:
        return None


def _value_of(bits: int, dtype: str) -> float:
    if dtype == "bfloat16":
        bits, dtype = bits << 16, "float32"
    float_format, int_format = _FORMATS[dtype]
    return float(struct.unpack(float_format, struct.pack(int_format, bits))[0])


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


def to_numel(op: str, numel: SupportsIndex) -> int:
    return to_integer(op, "numel", numel, 0, 2**63 - 1)


def words_for(numel: int) -> int:
    """How many words hold the signs of ``numel`` coordinates."""
    return (numel + 31) // 32


def check_same_kind(op: str, name: str, x: object, like: object) -> None:
    kind = torch.Tensor if isinstance(like, torch.Tensor) else np.ndarray
    if not isinstance(x, kind):
        expected = "a torch tensor" if kind is torch.Tensor else "a NumPy array"
        raise TypeError(f"{op}: {name} is a {type(x).__name__}, expected {expected} like the other arguments")


def _to_torch_dtype(op: str, dtype: Any) -> torch.dtype:
    found = TORCH_DTYPES_BY_NAME.get(dtype) if isinstance(dtype, str) else dtype
    if isinstance(found, torch.dtype) and found in TORCH_DTYPES:
        return found
    raise TypeError(f"{op}: dtype is {dtype!r}, expected torch's {DTYPES}")


def _to_dtype(op: str, like: AnyArray, dtype: Any) -> Any:
    """``dtype`` as a torch or NumPy dtype, after the kind of ``like``."""
    if isinstance(like, torch.Tensor):
        return _to_torch_dtype(op, dtype)
    found: Any = None
    with contextlib.suppress(TypeError):
        found = np.dtype(dtype)
    if found is not None and (found in NUMPY_DTYPES or found.name == "bfloat16"):
        return found
    raise TypeError(f"{op}: dtype is {dtype!r}, expected NumPy's float32, float64 or float16, or ml_dtypes' bfloat16")


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


def input_stack(op: str, stack: Any) -> tuple[Any, Any, torch.device]:
    """The memory of the rows of a vote, an array like which the result is, and where the vote is."""
    if not isinstance(stack, (list, tuple)):
        device = device_of(op, "stack", stack)
        return input_words(op, "stack", stack, device), stack, device
    if not stack:
        raise ValueError(f"{op}: stack has 0 rows, expected 1 to 65535")
    device = device_of(op, "stack[0]", stack[0])
    for i, row in enumerate(stack):
        check_same_kind(op, f"stack[{i}]", row, stack[0])
    return [input_words(op, f"stack[{i}]", row, device) for i, row in enumerate(stack)], stack[0], device


def width_of(words: AnyArray) -> int:
    return words.shape[-1] if words.ndim else 0


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


def coordinates_out(
    op: str, like: AnyArray, numel: int, dtype: Any, out: Any, device: torch.device
) -> tuple[Any, Any, str]:
    """``out`` or ``numel`` new coordinates of the kind of ``like``, their memory, and the name of their dtype."""
    result = out
    if out is None:
        found = _to_dtype(op, like, "float32" if dtype is None else dtype)
        is_tensor = isinstance(like, torch.Tensor)
        result = torch.empty(numel, dtype=found, device=device) if is_tensor else np.empty(numel, found)
    else:
        check_same_kind(op, "out", out, like)
        if dtype is not None and _to_dtype(op, like, dtype) != out.dtype:
            raise TypeError(f"{op}: out is {out.dtype}, expected {dtype}")
    return result, *written_coordinates(op, "out", result, device)
