"""The ops over runs, on the tensors of the hook: a bucket's coordinates, the words of its message, and what ties them.

A run is a piece of one parameter: a row ``(place, first, numel, coordinate, word)`` of an int64 NumPy array.

- ``place``: the parameter's index in the model;
- ``first``: the run's first coordinate, counted within the parameter, a multiple of 64;
- ``numel``: how many coordinates it has;
- ``coordinate``: where its first one lies in the bucket, and in the bucket's momentum;
- ``word``: where its first word lies in the message.

The coins of a run are those of the seed ``mix(seed + place)``, from block ``first // 64`` on. So they depend on the
place in the model only, and neither a bucket laid out anew nor a run cut at a multiple of 64 changes a bit. Only the
``num_words(numel)`` words of each run are read or written. Runs that are written to must not share words or
coordinates.

Ternary words are two planes: the words of a run in the plane ``active`` lie ``stride`` words behind those in ``sign``,
which ``word`` is the first of.

Errors, ``implementation`` and ``num_threads`` are as in :mod:`signvote.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray

from signvote import _core
from signvote.arguments import (
    input_coordinates,
    input_words,
    scale_bits,
    threshold_bits,
    written_coordinates,
    written_words,
)
from signvote.implementation import choices

Runs = NDArray[np.int64]
Coefficients = tuple[float, float, float, float]


def pack_runs(
    bucket: torch.Tensor,
    momentum: torch.Tensor | None,
    coefficients: Coefficients,
    runs: Runs,
    out: torch.Tensor,
    *,
    zeros: str,
    seed: int,
    implementation: str | None = None,
    num_threads: SupportsIndex | None = None,
) -> tuple[int, int]:
    """Pack the signs of every run of ``bucket`` into its words of ``out``.

    With ``momentum`` (as many coordinates as ``bucket``; float64 for float64, otherwise float32) it is
    :func:`signvote.ops.pack_momentum`, without it :func:`signvote.ops.pack_signs`, and ``coefficients`` count for
    nothing.

    Returns:
        How many coordinates were undecided (±0), and how many of ``bucket`` were not finite.
    """
    op = "pack_runs"
    source, dtype = input_coordinates(op, "bucket", bucket)
    kept = None if momentum is None else written_coordinates(op, "momentum", momentum)[0]
    words = written_words(op, "out", out)
    chosen = choices(implementation, num_threads)
    return _core.pack_runs(source, dtype, kept, coefficients, runs, zeros, seed, words, *chosen)


def vote_runs(
    rows: torch.Tensor | Sequence[torch.Tensor],
    runs: Runs,
    out: torch.Tensor,
    *,
    ties: str,
    seed: int,
    implementation: str | None = None,
    num_threads: SupportsIndex | None = None,
) -> int:
    """Vote on every run over M ``rows`` of S words, into the same words of ``out``.

    Args:
        rows: ``(M, S)`` words with any distance between rows, or M tensors of S words.
        out: S words.

    Returns:
        How many coordinates were tied.
    """
    op = "vote_runs"
    stack = _input_rows(op, rows)
    words = written_words(op, "out", out)
    return _core.vote_runs(stack, runs, ties, seed, words, *choices(implementation, num_threads))


def unpack_runs(
    words: torch.Tensor,
    runs: Runs,
    bucket: torch.Tensor,
    *,
    scale: float = 1.0,
    implementation: str | None = None,
    num_threads: SupportsIndex | None = None,
) -> None:
    """Write ±``scale`` to the coordinates of every run of ``bucket``, after the run's words."""
    op = "unpack_runs"
    source = input_words(op, "words", words)
    target, dtype = written_coordinates(op, "bucket", bucket)
    positive = scale_bits(op, scale, dtype)
    _core.unpack_runs(source, runs, dtype, positive, target, *choices(implementation, num_threads))


def pack_ternary_runs(
    bucket: torch.Tensor,
    runs: Runs,
    out: torch.Tensor,
    *,
    stride: int,
    threshold: float = 0.0,
    implementation: str | None = None,
    num_threads: SupportsIndex | None = None,
) -> tuple[int, int]:
    """Pack every run of ``bucket`` into its words of both planes in ``out``, as :func:`signvote.ops.pack_ternary`.

    Returns:
        How many coordinates abstain because they are not above ``threshold``, and how many are not finite. NaN abstains
        too, but counts as not finite only.
    """
    op = "pack_ternary_runs"
    source, dtype = input_coordinates(op, "bucket", bucket)
    limit = threshold_bits(op, threshold, dtype)
    words = written_words(op, "out", out)
    chosen = choices(implementation, num_threads)
    return _core.pack_ternary_runs(source, dtype, limit, runs, stride, words, *chosen)


def vote_ternary_runs(
    rows: torch.Tensor | Sequence[torch.Tensor],
    runs: Runs,
    out: torch.Tensor,
    *,
    stride: int,
    quorum: int = 1,
    implementation: str | None = None,
    num_threads: SupportsIndex | None = None,
) -> int:
    """Vote with abstention on every run over M ``rows``, into the same words of both planes in ``out``.

    Args:
        rows: ``(M, S)`` words with any distance between rows, or M tensors of S words: both planes of each message.
        out: S words.

    Returns:
        How many coordinates of the result are 0.
    """
    op = "vote_ternary_runs"
    stack = _input_rows(op, rows)
    words = written_words(op, "out", out)
    return _core.vote_ternary_runs(stack, runs, stride, quorum, words, *choices(implementation, num_threads))


def unpack_ternary_runs(
    words: torch.Tensor,
    runs: Runs,
    stride: int,
    bucket: torch.Tensor,
    *,
    scale: float = 1.0,
    implementation: str | None = None,
    num_threads: SupportsIndex | None = None,
) -> None:
    """Write ±``scale`` or 0 to the coordinates of every run of ``bucket``, after the run's words in both planes."""
    op = "unpack_ternary_runs"
    source = input_words(op, "words", words)
    target, dtype = written_coordinates(op, "bucket", bucket)
    positive = scale_bits(op, scale, dtype)
    chosen = choices(implementation, num_threads)
    _core.unpack_ternary_runs(source, runs, stride, dtype, positive, target, *chosen)


def _input_rows(op: str, rows: torch.Tensor | Sequence[torch.Tensor]) -> Any:
    if isinstance(rows, torch.Tensor):
        return input_words(op, "rows", rows)
    return [input_words(op, f"rows[{i}]", row) for i, row in enumerate(rows)]
