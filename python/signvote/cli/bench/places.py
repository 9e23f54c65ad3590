"""Where ops are measured: which memory they are given, which plain operations are their limits, and whose clock counts.

A case is made and checked in host memory, by NumPy, wherever it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from signvote import _limits
from signvote.cli.bench.measure import seconds_of_host

Call = Callable[[], object]


def as_tensor(x: NDArray[Any]) -> torch.Tensor:
    """The same memory: words as int32, bits of bfloat16 as bfloat16."""
    if x.dtype == np.uint32:
        return torch.from_numpy(x.view(np.int32))
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == np.uint16 else torch.from_numpy(x)


class Place(Protocol):
    device: torch.device  # of the tensors

    @property
    def limits(self) -> Any:
        """The plain operations, by name, on arrays of the case; their last argument is a number of threads."""

    def arguments(self, given: Sequence[NDArray[Any]], written: Sequence[NDArray[Any]]) -> list[Any]:
        """The arrays of the case, as the ops take them; ``written`` are read too."""

    def tensors(self, given: Sequence[NDArray[Any]], written: Sequence[NDArray[Any]]) -> list[torch.Tensor]:
        """The same as tensors."""

    def bring(self) -> None:
        """Hand what is written over, as it is in host memory."""

    def fetch(self) -> None:
        """Take what was written back to host memory."""

    def seconds(self, call: Call, calls: int) -> float:
        """How long ``calls`` calls take."""


class Host:
    """The CPU: everything is where the case has it. bfloat16, and what goes with it, are tensors, all else arrays."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    @property
    def limits(self) -> Any:
        return _limits

    def arguments(self, given: Sequence[NDArray[Any]], written: Sequence[NDArray[Any]]) -> list[Any]:
        arrays = [*given, *written]
        return self.tensors(given, written) if any(x.dtype == np.uint16 for x in arrays) else arrays

    def tensors(self, given: Sequence[NDArray[Any]], written: Sequence[NDArray[Any]]) -> list[torch.Tensor]:
        return [as_tensor(x) for x in (*given, *written)]

    def bring(self) -> None:
        pass

    def fetch(self) -> None:
        pass

    def seconds(self, call: Call, calls: int) -> float:
        return seconds_of_host(call, calls)


class Cuda:
    """A CUDA device, one for each case: arrays are copied there once, and times are those of its events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: dict[int, tuple[NDArray[Any], torch.Tensor]] = {}
        self._written: dict[int, None] = {}

    @property
    def limits(self) -> Any:
        return CudaLimits(self)

    def arguments(self, given: Sequence[NDArray[Any]], written: Sequence[NDArray[Any]]) -> list[Any]:
        return list(self.tensors(given, written))

    def tensors(self, given: Sequence[NDArray[Any]], written: Sequence[NDArray[Any]]) -> list[torch.Tensor]:
        self._written.update(dict.fromkeys(map(id, written)))
        return [self.copy_of(x) for x in (*given, *written)]

    def copy_of(self, x: NDArray[Any]) -> torch.Tensor:
        if id(x) not in self._copies:
            self._copies[id(x)] = x, as_tensor(x).to(self.device, copy=True)
        return self._copies[id(x)][1]

    def bring(self) -> None:
        for array, copy in map(self._copies.__getitem__, self._written):
            copy.copy_(as_tensor(array))

    def fetch(self) -> None:
        for array, copy in map(self._copies.__getitem__, self._written):
            as_tensor(array).copy_(copy)

    def seconds(self, call: Call, calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3


class CudaLimits:
    """What torch makes of the same accesses: sums for reads, a constant for writes."""

    def __init__(self, place: Cuda) -> None:
        self._device, self._on = place.device, place.copy_of

    def read(self, x: NDArray[Any], threads: int) -> object:
        return self._on(x).sum()

    def write(self, out: NDArray[Any], value: int, threads: int) -> object:
        return self._on(out).fill_(value)

    def update(self, x: NDArray[Any], out: NDArray[Any], threads: int) -> object:
        return self._on(out).add_(self._on(x))

    def read_rows_then_write(self, rows: NDArray[Any], out: NDArray[Any], threads: int) -> None:
        self.read(rows, threads)
        self.write(out, 0, threads)

    def copy_of_size(self, size: int) -> Call:
        """A copy within the device that reads half as many bytes and writes the other half."""
        source, target = torch.zeros(2, size // 2, dtype=torch.uint8, device=self._device)
        return lambda: target.copy_(source)
