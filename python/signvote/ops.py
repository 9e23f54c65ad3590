"""The ops on NumPy arrays and tensors: allocate, call the native module.

A word is 32 sign bits, least significant bit first: coordinate ``i`` is bit ``i % 32`` of word ``i // 32``, 1 for a
positive coordinate, and the unused bits of the last word are 0. Words are ``uint32`` in NumPy and ``int32`` in torch.

Ternary words are ``(2, W)``: the plane ``sign`` and the plane ``active``, which is 1 where a coordinate is not 0. Ops
write sign 0 where a coordinate is 0, and read none there.

NumPy arrays in give NumPy arrays out, tensors in give tensors out on the same device. On a CUDA device an op works on
torch's current stream and, apart from :func:`has_nonfinite`, returns before it is done; ``implementation`` and
``num_threads`` are the CPU's, and must be None there. Inputs must be contiguous; the result never takes part in
autograd. Errors name op, argument, what it is and what was expected: ``TypeError`` for a type or dtype, ``ValueError``
for anything else, ``RuntimeError`` from CUDA. When a ``TypeError`` or ``ValueError`` is raised, nothing has been
written. An error from CUDA may come from work that was begun earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsFloat, SupportsIndex

import torch
from numpy.typing import DTypeLike

from signvote import _core, cuda
from signvote.arguments import (
    CPU,
    AnyArray,
    Array,
    check_same_kind,
    coordinates_out,
    device_of,
    input_coordinates,
    input_stack,
    input_words,
    scale_bits,
    size_of,
    threshold_bits,
    to_numel,
    width_of,
    words_for,
    words_out,
    written_coordinates,
)
from signvote.implementation import choices


def _call(
    native: Callable[..., Any],
    device: torch.device,
    arguments: tuple[Any, ...],
    implementation: str | None,
    num_threads: SupportsIndex | None,
    counts: torch.Tensor | None = None,
) -> Any:
    """The op ``native`` of ``_core``, or its counterpart on a CUDA device, which returns None."""
    if device is CPU:
        return native(*arguments, *choices(implementation, num_threads))
    op = native.__name__
    for name, value in (("implementation", implementation), ("num_threads", num_threads)):
        if value is not None:
            raise ValueError(f"{op}: {name} is {value!r}, expected None for a tensor on {device}")
    cuda.launch(op, device, arguments, counts=counts)
    return None


def num_words(numel: SupportsIndex) -> int:
    """How many words hold the signs of ``numel`` coordinates.

    Equivalent to: ``(numel + 31) // 32``

    Raises:
        TypeError: ``numel`` is not an integer.
        ValueError: ``numel`` is negative.
    """
    return words_for(to_numel("num_words", numel))


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
        implementation: One of :func:`signvote.implementations`; None on a CUDA device.
        num_threads: How many threads may work on it at most, the caller's included; ``torch.get_num_threads()`` unless
            given. Small arrays stay on the caller's thread. The result does not depend on it. None on a CUDA device.

    Returns:
        ``out``, or a new array of ``num_words(numel)`` words.

    Raises:
        TypeError: ``x`` or ``out`` has another type or dtype.
        ValueError: ``x`` is not contiguous, or neither on the CPU nor on a CUDA device; ``out`` has another size, is
            read-only, requires gradients, overlaps ``x`` or is on another device; ``zeros``, ``seed``,
            ``implementation`` or ``num_threads`` is none of the above.
        RuntimeError: ``x`` is on a CUDA device and signvote was built without its CUDA part, or CUDA reports an error.
    """
    op = "pack_signs"
    device = device_of(op, "x", x)
    source, dtype = input_coordinates(op, "x", x, device)
    result, words = words_out(op, x, (words_for(size_of(x)),), out, device)
    _call(_core.pack_signs, device, (source, dtype, zeros, seed, words), implementation, num_threads)
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
    device = device_of(op, "x", x)
    source, dtype = input_coordinates(op, "x", x, device)
    check_same_kind(op, "momentum", momentum, x)
    kept, momentum_dtype = written_coordinates(op, "momentum", momentum, device)
    expected = "float64" if dtype == "float64" else "float32"
    if momentum_dtype != expected:
        raise TypeError(f"{op}: momentum is {momentum_dtype}, expected {expected} for a {dtype} x")
    result, words = words_out(op, x, (words_for(size_of(x)),), out, device)
    try:
        a, b, c, d = map(float, coefficients)
    except (TypeError, ValueError):
        raise ValueError(f"{op}: coefficients is {coefficients!r}, expected four finite numbers") from None
    arguments = source, dtype, kept, (a, b, c, d), zeros, seed, words
    _call(_core.pack_momentum, device, arguments, implementation, num_threads)
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
            M from 1 to 65535. On a CUDA device M tensors are first copied into one.
        ties: The bit of a coordinate with as many plus as minus: ``"coin"``, ``"positive"`` or ``"negative"``.
        seed: Of the coins, 0 to 2**64 - 1. The same on all replicas.
        numel: How many coordinates the words hold; ``32 * W`` unless given.
        out: W words to write to.
        implementation: One of :func:`signvote.implementations`; None on a CUDA device.
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
    rows, like, device = input_stack(op, stack)
    result, words = words_out(op, like, (width_of(like),), out, device)
    if isinstance(rows, list) and device is not CPU:
        rows = cuda.stacked(op, "stack", rows, words)
    _call(_core.majority_vote, device, (rows, numel, ties, seed, words), implementation, num_threads)
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
        implementation: One of :func:`signvote.implementations`; None on a CUDA device.
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
    device = device_of(op, "words", words)
    source = input_words(op, "words", words, device)
    numel = to_numel(op, numel)
    if size_of(words) != words_for(numel):
        raise ValueError(f"{op}: words has {size_of(words)} words, expected {words_for(numel)} for numel {numel}")
    result, target, name = coordinates_out(op, words, numel, dtype, out, device)
    positive = scale_bits(op, scale, name)
    _call(_core.unpack_signs, device, (source, numel, name, positive, target), implementation, num_threads)
    return result


def pack_ternary(
    x: Array,
    *,
    threshold: SupportsFloat = 0.0,
    out: Array | None = None,
    implementation: str | None = None,
    num_threads: SupportsIndex | None = None,
) -> Array:
    """Pack the signs of the coordinates of ``x`` above a threshold, and 0 for the others: two bits per coordinate.

    With 0 a worker abstains, as one should that is unsure of the sign: the "majority vote with abstention" of Bernstein
    et al., signSGD: Compressed Optimisation for Non-Convex Problems (ICML 2018), section 6.

    Equivalent to: ``active = abs(x) > threshold; sign = active & (x > 0)``, packed as :func:`pack_signs` packs.

    Args:
        x: As in :func:`pack_signs`. NaN is 0, ±inf is not.
        threshold: 0 or more, inf included, which nothing is above. It is not rounded to the dtype of ``x``.
        out: ``(2, num_words(numel))`` words to write to, with any distance between the planes.
        implementation: One of :func:`signvote.implementations`; None on a CUDA device.
        num_threads: As in :func:`pack_signs`.

    Returns:
        ``out``, or new ``(2, num_words(numel))`` words: sign and active.

    Raises:
        TypeError: ``x`` or ``out`` has another type or dtype, or ``threshold`` is not a number.
        ValueError: As :func:`pack_signs`; ``out`` has another shape; ``threshold`` is negative or NaN.
    """
    op = "pack_ternary"
    device = device_of(op, "x", x)
    source, dtype = input_coordinates(op, "x", x, device)
    limit = threshold_bits(op, threshold, dtype)
    result, planes = words_out(op, x, (2, words_for(size_of(x))), out, device)
    _call(_core.pack_ternary, device, (source, dtype, limit, planes), implementation, num_threads)
    return result


def majority_vote_ternary(
    stack: Array | Sequence[Array],
    *,
    quorum: SupportsIndex = 1,
    numel: SupportsIndex | None = None,
    out: Array | None = None,
    implementation: str | None = None,
    num_threads: SupportsIndex | None = None,
) -> Array:
    """Per coordinate, the sign that more of M workers sent, or 0 where it leads by less than a quorum.

    The server's part of the "majority vote with abstention" of Bernstein et al. (ICML 2018), section 6, whose quorum is
    not reached where "too many workers disagreed or abstained". With ``quorum=1`` only ties are 0.

    Equivalent to: ``lead = votes.sum(axis=0); np.where(abs(lead) < quorum, 0, np.sign(lead))`` for the unpacked
    ``votes``, each 1, 0 or -1.

    Args:
        stack: ``(M, 2, W)`` words, whose rows and planes may lie at any distance from each other, or M arrays of
            ``(2, W)`` words; M from 1 to 65535. On a CUDA device M tensors are first copied into one.
        quorum: 1 or more. Beyond M, all coordinates are 0.
        numel: How many coordinates the words hold; ``32 * W`` unless given.
        out: ``(2, W)`` words to write to, with any distance between the planes.
        implementation: One of :func:`signvote.implementations`; None on a CUDA device.
        num_threads: As in :func:`pack_signs`.

    Returns:
        ``out``, or new ``(2, W)`` words: sign and active.

    Raises:
        TypeError: ``stack`` or ``out`` has another type or dtype, or ``numel`` or ``quorum`` is not an integer.
        ValueError: As :func:`majority_vote`; ``stack`` or ``out`` has another shape; ``quorum`` is less than 1.
    """
    op = "majority_vote_ternary"
    rows, like, device = input_stack(op, stack)
    result, planes = words_out(op, like, (2, width_of(like)), out, device)
    if isinstance(rows, list) and device is not CPU:
        rows = cuda.stacked(op, "stack", rows, planes, is_ternary=True)
    _call(_core.majority_vote_ternary, device, (rows, numel, quorum, planes), implementation, num_threads)
    return result


def unpack_ternary(
    planes: Array,
    numel: SupportsIndex,
    *,
    dtype: DTypeLike | torch.dtype | None = None,
    scale: SupportsFloat = 1.0,
    out: Array | None = None,
    implementation: str | None = None,
    num_threads: SupportsIndex | None = None,
) -> Array:
    """Write ``scale`` or ``-scale`` where a coordinate is active, after its sign, and 0 where it is not.

    Equivalent to: ``np.where(active, np.where(sign, scale, -scale), 0)`` for the unpacked planes.

    Args:
        planes: ``(2, num_words(numel))`` words, with any distance between the planes.
        numel, dtype, scale, out: As in :func:`unpack_signs`.
        implementation: One of :func:`signvote.implementations`; None on a CUDA device.
        num_threads: As in :func:`pack_signs`.

    Returns:
        ``out``, or a new 1-D array of ``numel`` coordinates.

    Raises:
        TypeError, ValueError: As :func:`unpack_signs`; ValueError also if ``planes`` has another shape.
    """
    op = "unpack_ternary"
    device = device_of(op, "planes", planes)
    source = input_words(op, "planes", planes, device)
    numel = to_numel(op, numel)
    shape, expected = tuple(planes.shape), (2, words_for(numel))
    if shape != expected:
        raise ValueError(f"{op}: planes has shape {shape}, expected {expected} for numel {numel}")
    result, target, name = coordinates_out(op, planes, numel, dtype, out, device)
    positive = scale_bits(op, scale, name)
    _call(_core.unpack_ternary, device, (source, numel, name, positive, target), implementation, num_threads)
    return result


def has_nonfinite(x: AnyArray, *, implementation: str | None = None, num_threads: SupportsIndex | None = None) -> bool:
    """Whether any coordinate of ``x`` is NaN or ±inf.

    Equivalent to: ``not np.isfinite(x).all()``

    Args:
        x: As in :func:`pack_signs`.
        implementation: One of :func:`signvote.implementations`; None on a CUDA device.
        num_threads: As in :func:`pack_signs`.

    Raises:
        TypeError, ValueError: As :func:`pack_signs`.
    """
    op = "has_nonfinite"
    device = device_of(op, "x", x)
    source, dtype = input_coordinates(op, "x", x, device)
    if device is CPU:
        return bool(_call(_core.has_nonfinite, device, (source, dtype), implementation, num_threads))
    counts = torch.empty(2, dtype=torch.int64, device=device)
    _call(_core.has_nonfinite, device, (source, dtype), implementation, num_threads, counts)
    return bool(counts[1].item())
