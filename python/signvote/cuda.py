"""The CUDA part: whether it is there, and calls of its ops, which are launches on torch's current stream."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch

BUILD_COMMAND = "pip install --force-reinstall --no-deps --config-settings=cmake.define.SIGNVOTE_CUDA=ON ."


@functools.cache
def find_module() -> Any:
    """``signvote._cuda``, or None where signvote was built without it."""
    try:
        return importlib.import_module("signvote._cuda")
    except ModuleNotFoundError as error:
        if error.name != "signvote._cuda":
            raise
        return None


def cuda_available() -> bool:
    """Whether the ops work on torch's current CUDA device.

    That is: signvote was built with its CUDA part, torch for CUDA, and the driver can run the kernels on the device.
    To find out, the device is initialized, as the first op on it would do.
    """
    module = find_module()
    if module is None or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    available: bool = module.can_run(torch.cuda.current_device())
    return available


def is_on_cuda(x: object) -> TypeGuard[torch.Tensor]:
    return isinstance(x, torch.Tensor) and x.is_cuda


def module_for(op: str, name: str, device: torch.device) -> Any:
    """``_cuda``, for an argument on ``device``."""
    if torch.version.hip is not None:
        raise RuntimeError(
            f"{op}: {name} is on a ROCm device, expected one of CUDA or the CPU: there are no ROCm kernels"
        )
    module = find_module()
    if module is None:
        raise RuntimeError(
            f"{op}: {name} is on device {device}, but signvote was built without its CUDA part: in a checkout, with "
            f"nvcc in PATH: {BUILD_COMMAND}"
        )
    return module


@contextmanager
def _current(device: torch.device) -> Iterator[tuple[int, Any]]:
    """The index of ``device``, which is the current one meanwhile, and its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_device(), torch.cuda.current_stream()


def launch(
    op: str,
    device: torch.device,
    arguments: tuple[Any, ...],
    pieces: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> None:
    """Call the native op, which neither waits for the device nor copies to the host.

    Args:
        arguments: Those of ``_core``'s function, without implementation and threads; tensors in place of arrays.
        pieces: Of an op on runs, what takes the place of the runs on the device.
        counts: Where to count what ``_core``'s function returns; nowhere unless given.
    """
    with _current(device) as (index, stream):
        of_runs = () if pieces is None else (pieces,)
        getattr(find_module(), op)(*arguments, *of_runs, counts, index, stream.cuda_stream)
        if pieces is not None:
            pieces.record_stream(stream)  # they may be freed before this is done, and belong to another stream


def stacked(
    op: str, name: str, rows: list[torch.Tensor], out: torch.Tensor, *, is_ternary: bool = False
) -> torch.Tensor:
    """Rows of a vote in one tensor: the kernel finds them by their distance."""
    module = find_module()
    check, planes = (module.check_ballot, 2) if is_ternary else (module.check_row, 1)
    for i, row in enumerate(rows):
        check(op, name, i, row, rows[0].numel() // planes, out)
    return torch.stack(rows)
