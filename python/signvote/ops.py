"""The ops on NumPy arrays and CPU tensors: allocate, choose the implementation, call the native module.

A word is 32 sign bits, least significant bit first: coordinate ``i`` is bit ``i % 32`` of word ``i // 32``, 1 for a
positive coordinate, and the unused bits of the last word are 0. Words are ``uint32`` in NumPy and ``int32`` in torch.

NumPy arrays in give NumPy arrays out, tensors in give tensors out. Inputs must be contiguous; the result never takes
part in autograd. Errors name op, argument, what it is and what was expected: ``TypeError`` for a type or dtype,
``ValueError`` for anything else. When an op raises, nothing has been written.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from signvote import _core

Array = TypeVar("Array", NDArray[Any], torch.Tensor)
AnyArray: TypeAlias = NDArray[Any] | torch.Tensor

_NUMPY_DTYPES = {np.dtype(name): name for name in ("float32", "float64", "float16")}
_TORCH_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_TORCH_DTYPES_BY_NAME = {name: dtype for dtype, name in _TORCH_DTYPES.items()}
_DTYPES = "float32, float64, float16 or bfloat16"


def implementations() -> list[str]:
    """Names of the implementations that this CPU can run, best first."""
    return _core.implementations()


@functools.cache
def default_implementation() -> str:
    """The implementation that ops take unless told: ``SIGNVOTE_IMPLEMENTATION`` if it is set, otherwise the best.

    The environment is read once, at the first use.

    Raises:
        ValueError: ``SIGNVOTE_IMPLEMENTATION`` names none of :func:`implementations`.
    """
    names = _core.implementations()
    name = os.environ.get("SIGNVOTE_IMPLEMENTATION") or names[0]
    if name not in names:
        raise ValueError(f"SIGNVOTE_IMPLEMENTATION is {name!r}, expected one of {', '.join(map(repr, names))}")
    return name


def choices(implementation: str | None, num_threads: SupportsIndex | None) -> tuple[str, SupportsIndex]:
    """The implementation and the number of threads, or what takes their place where they are None."""
    return implementation or default_implementation(), torch.get_num_threads() if num_threads is None else num_threads


def num_words(numel: SupportsIndex) -> int:
    """How many words hold the signs of ``numel`` coordinates.

    Equivalent to: ``(numel + 31) // 32``

    Raises:
        TypeError: ``numel`` is not an integer.
        ValueError: ``numel`` is negative.
    """
    return (_to_numel("num_words", numel) + 31) // 32


def pack_signs(
    x: Array,
    *,
    zeros: str = "coin",
    seed: SupportsIndex = 0,
    out: Array | None = None,
    implementation: str | None = None,
    num_threads: SupportsIndex | None = None,
) -> Array:
    """Pack the signs of ``x``, one bit per coordinate: what a worker sends in the paper's Algorithm 2.

    Equivalent to: ``np.packbits(x > 0, bitorder="little")``, padded to words, where no coordinate is zero.

    Args:
        x: Any shape, contiguous, float32, float64, float16 or bfloat16. Coordinates count in C order. NaN has bit 0.
        zeros: The bit of a coordinate that is ±0: ``"coin"`` (reproducible and unbiased, so that nothing drifts),
            ``"positive"`` or ``"negative"``.
        seed: Of the coins, 0 to 2**64 - 1.
        out: ``num_words(numel)`` words to write to.
        implementation: One of :func:`implementations`.
        num_threads: How many threads may work on it at most, the caller's included; ``torch.get_num_threads()`` unless
            given. Small arrays stay on the caller's thread. The result does not depend on it.

    Returns:
        ``out``, or a new array of ``num_words(numel)`` words.

    Raises:
        TypeError: ``x`` or ``out`` has another type or dtype.
        ValueError: ``x`` is not contiguous or not on the CPU; ``out`` has another size, is read-only, requires
            gradients or overlaps ``x``; ``zeros``, ``seed`` or ``implementation`` is none of the above.
    """
    op = "pack_signs"
    source, dtype = input_coordinates(op, "x", x)
    result, words = words_out(op, x, ((source.size + 31) // 32,), out)
    _core.pack_signs(source, dtype, zeros, seed, words, *choices(implementation, num_threads))
    return result


def pack_momentum(
    x: Array,
    momentum: Array,
    *,
    coefficients: Iterable[Any],
    zeros: str = "coin",
    seed: SupportsIndex = 0,
    out: Array | None = None,
    implementation: str | None = None,
    num_threads: SupportsIndex | None = None,
) -> Array:
    """Update ``momentum`` in place with the gradient ``x`` and pack the signs to send, in one pass.

    With coefficients ``(a, b, c, d)`` it sends the signs of ``a * momentum + b * x`` and keeps
    ``c * momentum + d * x``. The paper's Signum, Algorithm 2 with momentum ``beta``, is
    ``(beta, 1 - beta, beta, 1 - beta)``; Lion is ``(beta1, 1 - beta1, beta2, 1 - beta2)``.

    Equivalent to: ``words = pack_signs(a * momentum + b * x); momentum[:] = c * momentum + d * x``, in the dtype of
    the momentum, where results below its smallest normal number count as 0, and a coordinate of ``x`` that is not
    finite leaves the momentum as it is and sends the sign of ``a * momentum``.

    Args:
        x: The gradient, as in :func:`pack_signs`.
        momentum: As many coordinates as ``x``, contiguous; float64 for float64 gradients, otherwise float32.
        coefficients: Four finite numbers.
        zeros, seed, out, implementation, num_threads: As in :func:`pack_signs`.

    Returns:
        ``out``, or a new array of ``num_words(numel)`` words.

    Raises:
        TypeError, ValueError: As :func:`pack_signs`, and for ``momentum`` what is said there of ``out``.
    """
    op = "pack_momentum"
    source, dtype = input_coordinates(op, "x", x)
    check_same_kind(op, "momentum", momentum, x)
    kept, momentum_dtype = written_coordinates(op, "momentum", momentum)
    expected = "float64" if dtype == "float64" else "float32"
    if momentum_dtype != expected:
        raise TypeError(f"{op}: momentum is {momentum_dtype}, expected {expected} for a {dtype} x")
    result, words = words_out(op, x, ((source.size + 31) // 32,), out)
    try:
        a, b, c, d = map(float, coefficients)
    except (TypeError, ValueError):
        raise ValueError(f"{op}: coefficients is {coefficients!r}, expected four finite numbers") from None
    _core.pack_momentum(source, dtype, kept, (a, b, c, d), zeros, seed, words, *choices(implementation, num_threads))
    return result


def majority_vote(
    stack: Array | Sequence[Array],
    *,
    ties: str = "coin",
    seed: SupportsIndex = 0,
    numel: SupportsIndex | None = None,
    out: Array | None = None,
    implementation: str | None = None,
    num_threads: SupportsIndex | None = None,
) -> Array:
    """Per coordinate, the sign that more of M workers sent: the server's part of the paper's Algorithm 3.

    Equivalent to: ``2 * bits.sum(axis=0) > M`` for the unpacked ``bits`` of an odd number M of rows.

    Args:
        stack: ``(M, W)`` words, whose rows may lie at any distance from each other, or M arrays of W words each;
            M from 1 to 65535.
        ties: The bit of a coordinate with as many plus as minus: ``"coin"``, ``"positive"`` or ``"negative"``.
        seed: Of the coins, 0 to 2**64 - 1. The same on all replicas.
        numel: How many coordinates the words hold; ``32 * W`` unless given.
        out: W words to write to.
        implementation: One of :func:`implementations`.
        num_threads: As in :func:`pack_signs`.

    Returns:
        ``out``, or a new array of W words.

    Raises:
        TypeError: ``stack`` or ``out`` has another type or dtype, or ``numel`` is not an integer.
        ValueError: ``stack`` has no row or more than 65535, rows of different sizes, or rows that are not
            contiguous; ``numel`` does not take W words; ``out`` has another size, is read-only, requires gradients or
            overlaps ``stack``; ``ties``, ``seed`` or ``implementation`` is none of the above.
    """
    op = "majority_vote"
    rows: NDArray[Any] | list[NDArray[Any]]
    like: Any
    if isinstance(stack, (list, tuple)):
        if not stack:
            raise ValueError(f"{op}: stack has 0 rows, expected 1 to 65535")
        like = stack[0]
        for i, row in enumerate(stack):
            check_same_kind(op, f"stack[{i}]", row, like)
        rows = [input_words(op, f"stack[{i}]", row) for i, row in enumerate(stack)]
        width = rows[0].size
    else:
        like = stack
        rows = input_words(op, "stack", like)
        width = rows.shape[-1] if rows.ndim else 0
    result, words = words_out(op, like, (width,), out)
    _core.majority_vote(rows, numel, ties, seed, words, *choices(implementation, num_threads))
    return result


def unpack_signs(
    words: Array,
    numel: SupportsIndex,
    *,
    dtype: DTypeLike | torch.dtype | None = None,
    scale: SupportsFloat = 1.0,
    out: Array | None = None,
    implementation: str | None = None,
    num_threads: SupportsIndex | None = None,
) -> Array:
    """Write ``scale`` where the bit is 1 and ``-scale`` where it is 0.

    Equivalent to: ``np.where(bits, scale, -scale)`` for the unpacked ``bits``.

    Args:
        words: ``num_words(numel)`` words.
        numel: How many coordinates to unpack.
        dtype: float32, float64, float16 or bfloat16; that of ``out`` if it is given, otherwise float32.
        scale: A number that is finite in ``dtype``, where it is rounded to the nearest value.
        out: ``numel`` coordinates to write to, of any shape.
        implementation: One of :func:`implementations`.
        num_threads: As in :func:`pack_signs`.

    Returns:
        ``out``, or a new 1-D array of ``numel`` coordinates.

    Raises:
        TypeError: ``words``, ``dtype`` or ``out`` has another type or dtype, ``numel`` is not an integer, or ``scale``
            is not a number.
        ValueError: ``numel`` does not take as many words as there are; ``scale`` is not finite in ``dtype``; ``out``
            has another size, is not contiguous, is read-only, requires gradients or overlaps ``words``;
            ``implementation`` is none of the above.
    """
    op = "unpack_signs"
    source = input_words(op, "words", words)
    numel = _to_numel(op, numel)
    if source.size != (numel + 31) // 32:
        raise ValueError(f"{op}: words has {source.size} words, expected {(numel + 31) // 32} for numel {numel}")
    result: Any
    if out is None:
        result = _empty_coordinates(op, words, numel, dtype)
    else:
        result = out
        check_same_kind(op, "out", out, words)
        if dtype is not None and _to_dtype(op, words, dtype) != out.dtype:
            raise TypeError(f"{op}: out is {out.dtype}, expected {dtype}")
    target, name = written_coordinates(op, "out", result)
    positive = scale_bits(op, scale, name)
    _core.unpack_signs(source, numel, name, positive, target, *choices(implementation, num_threads))
    return result


def has_nonfinite(x: AnyArray, *, implementation: str | None = None, num_threads: SupportsIndex | None = None) -> bool:
    """Whether any coordinate of ``x`` is NaN or ±inf.

    Equivalent to: ``not np.isfinite(x).all()``

    Args:
        x: As in :func:`pack_signs`.
        implementation: One of :func:`implementations`.
        num_threads: As in :func:`pack_signs`.

    Raises:
        TypeError, ValueError: As :func:`pack_signs`.
    """
    source, dtype = input_coordinates("has_nonfinite", "x", x)
    return _core.has_nonfinite(source, dtype, *choices(implementation, num_threads))


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


def _to_numel(op: str, numel: SupportsIndex) -> int:
    return to_integer(op, "numel", numel, 0, 2**63 - 1)


def check_same_kind(op: str, name: str, x: object, like: object) -> None:
    kind = torch.Tensor if isinstance(like, torch.Tensor) else np.ndarray
    if not isinstance(x, kind):
        expected = "a torch tensor" if kind is torch.Tensor else "a NumPy array"
        raise TypeError(f"{op}: {name} is a {type(x).__name__}, expected {expected} like the other arguments")


def _tensor_memory(op: str, name: str, x: torch.Tensor, written: bool) -> torch.Tensor:
    """``x`` without autograd, after the checks that NumPy's view of it could not make."""
    if x.layout is not torch.strided:
        raise ValueError(f"{op}: {name} has layout {x.layout}, expected a dense tensor; x.to_dense() makes one")
    if not x.is_cpu:
        cuda = "; this build has no CUDA part" if x.device.type == "cuda" else ""
        raise ValueError(f"{op}: {name} is on device {x.device}, expected cpu{cuda}")
    if x.is_neg():
        raise ValueError(f"{op}: {name} has its negative bit set, expected a plain tensor; x.resolve_neg() makes one")
    if x.requires_grad:
        if written:
            raise ValueError(f"{op}: {name} requires gradients, expected a tensor outside autograd; use x.detach()")
        return x.detach()
    return x


def input_coordinates(op: str, name: str, x: AnyArray, written: bool = False) -> tuple[NDArray[Any], str]:
    """The memory of ``x`` as the native module takes it, and the name of its dtype."""
    if isinstance(x, np.ndarray):
        dtype = _NUMPY_DTYPES.get(x.dtype)
        if dtype is not None:
            return x, dtype
        if x.dtype.name == "bfloat16":  # ml_dtypes
            return x.view(np.uint16), "bfloat16"
        raise TypeError(f"{op}: {name} is {x.dtype}, expected {_DTYPES}")
    if isinstance(x, torch.Tensor):
        dtype = _TORCH_DTYPES.get(x.dtype)
        if dtype is None:
            raise TypeError(f"{op}: {name} is {x.dtype}, expected {_DTYPES}")
        x = _tensor_memory(op, name, x, written)
        return (x.view(torch.int16) if dtype == "bfloat16" else x).numpy(), dtype
    raise TypeError(f"{op}: {name} is a {type(x).__name__}, expected a NumPy array or a torch tensor")


def written_coordinates(op: str, name: str, x: AnyArray) -> tuple[NDArray[Any], str]:
    """The same of coordinates that are written to."""
    return input_coordinates(op, name, x, written=True)


def input_words(op: str, name: str, x: AnyArray, written: bool = False) -> NDArray[Any]:
    """The memory of the words ``x``."""
    if isinstance(x, np.ndarray):
        return x
    if isinstance(x, torch.Tensor):
        if x.dtype is not torch.int32:
            raise TypeError(f"{op}: {name} is {x.dtype}, expected int32 words")
        return _tensor_memory(op, name, x, written).numpy()
    raise TypeError(f"{op}: {name} is a {type(x).__name__}, expected a NumPy array or a torch tensor")


def written_words(op: str, name: str, x: AnyArray) -> NDArray[Any]:
    """The memory of the words ``x``, which are written to."""
    return input_words(op, name, x, written=True)


def words_out(op: str, like: AnyArray, shape: tuple[int, ...], out: Any) -> tuple[Any, NDArray[Any]]:
    """``out`` or new words of the kind of ``like``, and their memory."""
    if out is None:
        if isinstance(like, np.ndarray):
            words = np.empty(shape, np.uint32)
            return words, words
        tensor = torch.empty(shape, dtype=torch.int32)
        return tensor, tensor.numpy()
    check_same_kind(op, "out", out, like)
    return out, written_words(op, "out", out)


def _to_dtype(op: str, like: AnyArray, dtype: Any) -> Any:
    """``dtype`` as a torch or NumPy dtype, after the kind of ``like``."""
    found: Any = None
    if isinstance(like, torch.Tensor):
        found = _TORCH_DTYPES_BY_NAME.get(dtype) if isinstance(dtype, str) else dtype
        if isinstance(found, torch.dtype) and found in _TORCH_DTYPES:
            return found
        raise TypeError(f"{op}: dtype is {dtype!r}, expected torch's {_DTYPES}")
    with contextlib.suppress(TypeError):
        found = np.dtype(dtype)
    if found is not None and (found in _NUMPY_DTYPES or found.name == "bfloat16"):
        return found
    raise TypeError(f"{op}: dtype is {dtype!r}, expected NumPy's float32, float64 or float16, or ml_dtypes' bfloat16")


def _empty_coordinates(op: str, like: AnyArray, numel: int, dtype: Any) -> Any:
    found = _to_dtype(op, like, "float32" if dtype is None else dtype)
    return torch.empty(numel, dtype=found) if isinstance(like, torch.Tensor) else np.empty(numel, found)
