"""The ops over runs on CUDA tensors, with the meanings and errors of :mod:`signvote.runs`.

They neither wait for the device nor copy to the host: what the CPU's return is counted in the device's memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from signvote import _core, cuda
from signvote.arguments import (
    device_of,
    input_coordinates,
    input_words,
    scale_bits,
    threshold_bits,
    written_coordinates,
    written_words,
)
from signvote.runs import Coefficients, Runs


def cut_runs(runs: Runs, largest: int) -> Runs:
    """The same coordinates in runs of at most ``largest``, a multiple of 64."""
    numels = runs[:, 2]
    counts = -(-numels // largest)
    pieces: Runs = np.repeat(runs, counts, axis=0)
    skipped = (np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)) * largest
    pieces[:, 1] += skipped
    pieces[:, 2] = np.minimum(pieces[:, 2] - skipped, largest)
    pieces[:, 3] += skipped
    pieces[:, 4] += skipped // 32
    return pieces


@dataclass(frozen=True, eq=False)
class DeviceRuns:
    """Runs as the kernels read them: in pieces, in the memory of a device, made once for many calls, by :meth:`of`."""

    runs: Runs
    pieces: torch.Tensor  # (n, 5) int64
    vote_pieces: torch.Tensor

    @classmethod
    def of(cls, runs: Runs, num_coordinates: int, num_words: int, device: torch.device) -> DeviceRuns:
        """Of runs in buckets of ``num_coordinates`` and messages of ``num_words``."""
        op = "DeviceRuns.of"
        module = cuda.module_for(op, "runs", device)
        _core.check_runs(op, runs, num_coordinates, num_words)
        copy: NDArray[np.int64] = runs.copy()
        copy.flags.writeable = False
        pieces, vote_pieces = (
            torch.from_numpy(cut_runs(copy, n)).to(device) for n in (module.piece, module.vote_piece)
        )
        return cls(copy, pieces, vote_pieces)

    def check_device(self, op: str, device: torch.device, counts: torch.Tensor | None = None) -> None:
        """That they, and where to count, are on the device of the other arguments."""
        for name, tensor in (("runs", self.pieces), ("counts", counts)):
            if tensor is not None and tensor.device != device:
                raise ValueError(f"{op}: {name} is on device {tensor.device}, expected {device}")


def _cuda_device_of(op: str, name: str, x: torch.Tensor) -> torch.device:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}, expected a tensor on a CUDA device")
    if not cuda.is_on_cuda(x):
        raise ValueError(f"{op}: {name} is on device {x.device}, expected a CUDA device")
    return device_of(op, name, x)


def pack_runs(
    bucket: torch.Tensor,
    momentum: torch.Tensor | None,
    coefficients: Coefficients,
    runs: DeviceRuns,
    out: torch.Tensor,
    counts: torch.Tensor,
    *,
    zeros: str,
    seed: int,
) -> None:
    """As :func:`signvote.runs.pack_runs`; how many were undecided and not finite goes to ``counts`` (int64, 2)."""
    op = "pack_runs"
    device = _cuda_device_of(op, "bucket", bucket)
    source, dtype = input_coordinates(op, "bucket", bucket, device)
    kept = None if momentum is None else written_coordinates(op, "momentum", momentum, device)[0]
    words = written_words(op, "out", out, device)
    runs.check_device(op, device, counts)
    arguments = source, dtype, kept, coefficients, runs.runs, zeros, seed, words
    cuda.launch(op, device, arguments, runs.pieces, counts)


def vote_runs(
    rows: torch.Tensor, runs: DeviceRuns, out: torch.Tensor, counts: torch.Tensor, *, ties: str, seed: int
) -> None:
    """As :func:`signvote.runs.vote_runs` on ``(M, S)`` words; how many were tied goes to ``counts`` (int64, 1)."""
    op = "vote_runs"
    device = _cuda_device_of(op, "rows", rows)
    stack = input_words(op, "rows", rows, device)
    words = written_words(op, "out", out, device)
    runs.check_device(op, device, counts)
    cuda.launch(op, device, (stack, runs.runs, ties, seed, words), runs.vote_pieces, counts)


def unpack_runs(words: torch.Tensor, runs: DeviceRuns, bucket: torch.Tensor, *, scale: float = 1.0) -> None:
    """As :func:`signvote.runs.unpack_runs`."""
    op = "unpack_runs"
    device = _cuda_device_of(op, "words", words)
    source = input_words(op, "words", words, device)
    target, dtype = written_coordinates(op, "bucket", bucket, device)
    runs.check_device(op, device)
    positive = scale_bits(op, scale, dtype)
    cuda.launch(op, device, (source, runs.runs, dtype, positive, target), runs.pieces)


def pack_ternary_runs(
    bucket: torch.Tensor,
    runs: DeviceRuns,
    out: torch.Tensor,
    counts: torch.Tensor,
    *,
    stride: int,
    threshold: float = 0.0,
) -> None:
    """As :func:`signvote.runs.pack_ternary_runs`; how many abstain and are not finite goes to ``counts`` (int64, 2)."""
    op = "pack_ternary_runs"
    device = _cuda_device_of(op, "bucket", bucket)
    source, dtype = input_coordinates(op, "bucket", bucket, device)
    limit = threshold_bits(op, threshold, dtype)
    words = written_words(op, "out", out, device)
    runs.check_device(op, device, counts)
    cuda.launch(op, device, (source, dtype, limit, runs.runs, stride, words), runs.pieces, counts)


def vote_ternary_runs(
    rows: torch.Tensor, runs: DeviceRuns, out: torch.Tensor, counts: torch.Tensor, *, stride: int, quorum: int = 1
) -> None:
    """As :func:`signvote.runs.vote_ternary_runs` on ``(M, S)`` words; how many are 0 goes to ``counts`` (int64, 1)."""
    op = "vote_ternary_runs"
    device = _cuda_device_of(op, "rows", rows)
    stack = input_words(op, "rows", rows, device)
    words = written_words(op, "out", out, device)
    runs.check_device(op, device, counts)
    cuda.launch(op, device, (stack, runs.runs, stride, quorum, words), runs.vote_pieces, counts)


def unpack_ternary_runs(
    words: torch.Tensor, runs: DeviceRuns, stride: int, bucket: torch.Tensor, *, scale: float = 1.0
) -> None:
    """As :func:`signvote.runs.unpack_ternary_runs`."""
    op = "unpack_ternary_runs"
    device = _cuda_device_of(op, "words", words)
    source = input_words(op, "words", words, device)
    target, dtype = written_coordinates(op, "bucket", bucket, device)
    runs.check_device(op, device)
    positive = scale_bits(op, scale, dtype)
    cuda.launch(op, device, (source, runs.runs, stride, dtype, positive, target), runs.pieces)
