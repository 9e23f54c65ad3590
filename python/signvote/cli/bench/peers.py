"""The same ops in a few lines of what a user has at hand, on whole words."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from signvote.cli.bench.expected import Words


@functools.cache
def shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(32, dtype=torch.int32, device=device)


def numpy_pack(x: NDArray[Any], out: Words) -> None:
    out.view(np.uint8)[:] = np.packbits(x > 0, bitorder="little")


def numpy_pack_momentum(x: NDArray[Any], m: NDArray[Any], beta: float, scratch: NDArray[Any], out: Words) -> None:
    np.multiply(x, m.dtype.type(1 - beta), out=scratch, dtype=m.dtype)
    np.multiply(m, m.dtype.type(beta), out=m)
    np.add(m, scratch, out=m)
    numpy_pack(m, out)


def numpy_unpack(words: Words, scale: float, out: NDArray[Any]) -> None:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    kind = out.dtype.type
    np.multiply(bits, kind(2 * scale), out=out, dtype=out.dtype)
    np.subtract(out, kind(scale), out=out)


def numpy_vote(rows: Sequence[Words], out: Words) -> None:
    """Ties become 0."""
    votes = np.zeros(32 * out.size, np.uint16)
    for row in rows:
        votes += np.unpackbits(row.view(np.uint8), bitorder="little")
    out.view(np.uint8)[:] = np.packbits(votes > len(rows) // 2, bitorder="little")


def numpy_pack_ternary(x: NDArray[Any], threshold: float, out: Words) -> None:
    out[0].view(np.uint8)[:] = np.packbits(x > threshold, bitorder="little")
    out[1].view(np.uint8)[:] = np.packbits(np.abs(x) > threshold, bitorder="little")


def numpy_unpack_ternary(planes: Words, scale: float, out: NDArray[Any]) -> None:
    sign, active = (np.unpackbits(plane.view(np.uint8), bitorder="little") for plane in planes)
    kind = out.dtype.type
    np.multiply(sign, kind(2 * scale), out=out, dtype=out.dtype)
    np.subtract(out, kind(scale), out=out)
    np.multiply(out, active, out=out)
    np.add(out, kind(0), out=out)  # -0 becomes 0


def numpy_vote_ternary(stack: NDArray[np.uint32], quorum: int, out: Words) -> None:
    lead = np.zeros(32 * out.shape[1], np.int32)
    for ballot in stack:
        sign, active = (np.unpackbits(plane.view(np.uint8), bitorder="little") for plane in ballot)
        lead += active
        lead -= 2 * (active & ~sign & 1)
    out[0].view(np.uint8)[:] = np.packbits(lead >= quorum, bitorder="little")
    out[1].view(np.uint8)[:] = np.packbits(np.abs(lead) >= quorum, bitorder="little")


def torch_pack(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.sum((x > 0).view(-1, 32) << shifts(x.device), dim=1, dtype=torch.int32, out=out)


def torch_pack_momentum(x: torch.Tensor, m: torch.Tensor, beta: float, out: torch.Tensor) -> None:
    m.mul_(beta).add_(x, alpha=1 - beta)
    torch_pack(m, out)


def torch_unpack(words: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    bits = words.unsqueeze(1) >> shifts(words.device) & 1
    torch.mul(bits, 2 * scale, out=out.view(-1, 32)).sub_(scale)


def torch_vote(signs: torch.Tensor, out: torch.Tensor) -> None:
    """Of signs that are unpacked already, one byte each; ties become 0."""
    torch.sign(torch.sum(signs, dim=0, dtype=torch.int16), out=out)


def torch_pack_ternary(x: torch.Tensor, threshold: float, out: torch.Tensor) -> None:
    for values, plane in ((x, out[0]), (x.abs(), out[1])):
        torch.sum((values > threshold).view(-1, 32) << shifts(x.device), dim=1, dtype=torch.int32, out=plane)


def torch_unpack_ternary(planes: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    sign, active = planes.unsqueeze(2) >> shifts(planes.device) & 1
    torch.mul(sign, 2 * scale, out=out.view(-1, 32)).sub_(scale).mul_(active).add_(0)


def torch_vote_ternary(votes: torch.Tensor, quorum: int, out: torch.Tensor) -> None:
    """Of votes that are unpacked already, one byte each."""
    torch.sum(votes, dim=0, dtype=torch.int16, out=out)
    out.mul_(out.abs() >= quorum)


@functools.cache
def find_cupy() -> Any:
    """CuPy, or None where it is not installed or cannot be used, whatever it raises then."""
    try:
        return importlib.import_module("cupy")
    except Exception:
        return None


def cupy_pack(x: torch.Tensor, out: torch.Tensor) -> None:
    cupy = find_cupy()
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        packed = cupy.packbits(cupy.from_dlpack(x) > 0, bitorder="little")
        cupy.from_dlpack(out.view(torch.uint8))[:] = packed
