"""What the ops over runs refuse, in the documented words; nothing is written then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bad_input import HALF, W, X, check, described, row, words
from signvote import runs


@pytest.mark.parametrize(
    ("table", "error", "message"),
    described(
        (row(place=-1), ValueError, "runs has place -1 in row 0, expected 0 or more"),
        (row(first=-64), ValueError, "runs has first -64 in row 0, expected a multiple of 64"),
        (row(first=32), ValueError, "runs has first 32 in row 0, expected a multiple of 64"),
        (row(numel=-1), ValueError, "runs has numel -1 in row 0, expected 0 or more"),
        (row(word=-1), ValueError, "runs has word -1 and numel 100 in row 0, expected a range within 4 words"),
        (row(word=1), ValueError, "runs has word 1 and numel 100 in row 0, expected a range within 4 words"),
        (row(word=2**62), ValueError, "runs has word 4611686018427387904 and numel 100 in row 0, expected a range"),
        (row(word=5, numel=0), ValueError, "runs has word 5 and numel 0 in row 0, expected a range within 4 words"),
        (np.zeros((1, 4), np.int64), ValueError, "runs has shape (1, 4), expected (n, 5)"),
        (np.zeros(5, np.int64), ValueError, "runs has shape (5,), expected (n, 5)"),
        (np.zeros((1, 5), np.int32), TypeError, "runs is dtype('int32'), expected int64"),
        (np.zeros((1, 5)), TypeError, "runs is dtype('float64'), expected int64"),
        (np.zeros((4, 5), np.int64)[::2], ValueError, "runs is not contiguous"),
        (np.zeros((5, 2), np.int64).T, ValueError, "runs is not contiguous"),
    ),
)
def test_runs(table: Any, error: type[Exception], message: str) -> None:
    def pack(out: torch.Tensor) -> object:
        return runs.pack_runs(X, None, HALF, table, out, zeros="coin", seed=0)

    def vote(out: torch.Tensor) -> object:
        return runs.vote_runs(torch.stack([W, W]), table, out, ties="coin", seed=0)

    def unpack(bucket: torch.Tensor) -> None:
        runs.unpack_runs(W, table, bucket)

    for op, call, out in (
        ("pack_runs", pack, words()),
        ("vote_runs", vote, words()),
        ("unpack_runs", unpack, torch.ones(100)),
    ):
        check(call, out, error, f"{op}: {message}")


@pytest.mark.parametrize(("coordinate", "numel"), [(-1, 10), (91, 10), (101, 0), (2**63 - 1, 10), (0, 101), (1, 100)])
def test_coordinates_of_runs(coordinate: int, numel: int) -> None:
    table = row(coordinate=coordinate, numel=numel)
    message = f"runs has coordinate {coordinate} and numel {numel} in row 0, expected a range within 100 coordinates"
    check(
        lambda out: runs.pack_runs(X, None, HALF, table, out, zeros="coin", seed=0),
        words(),
        ValueError,
        f"pack_runs: {message}",
    )
    check(lambda out: runs.unpack_runs(W, table, out), torch.ones(100), ValueError, f"unpack_runs: {message}")


def test_sizes_and_overlap_of_runs() -> None:
    table = row()
    stack = torch.stack([W, W])
    momentum = torch.ones(99)
    check(
        lambda out: runs.pack_runs(X, momentum, HALF, table, out, zeros="coin", seed=0),
        words(),
        ValueError,
        "pack_runs: momentum has 99 coordinates, expected 100",
    )
    check(
        lambda out: runs.pack_runs(X, torch.ones(100).double(), HALF, table, out, zeros="coin", seed=0),
        words(),
        TypeError,
        "pack_runs: momentum is dtype('float64'), expected float32",
    )
    check(
        lambda out: runs.vote_runs(stack, table, out, ties="coin", seed=0),
        words(5),
        ValueError,
        "vote_runs: out has 5 words, expected 4",
    )
    check(
        lambda out: runs.vote_runs(stack, table, out, ties="coin", seed=0),
        stack[1],
        ValueError,
        "vote_runs: out overlaps rows, expected memory of its own",
    )
    check(
        lambda out: runs.unpack_runs(W, table, out, scale=float("nan")),
        torch.ones(100),
        ValueError,
        "unpack_runs: scale is nan, expected a number that is finite in float32",
    )
    memory = torch.ones(104)
    check(
        lambda out: runs.unpack_runs(memory[:4].view(torch.int32), table, out),
        memory[2:102],
        ValueError,
        "unpack_runs: bucket overlaps words, expected memory of its own",
    )
    check(
        lambda out: runs.pack_runs(memory[:100], None, HALF, table, out, zeros="coin", seed=0),
        memory[98:102].view(torch.int32),
        ValueError,
        "pack_runs: out overlaps bucket, expected memory of its own",
    )
    check(
        lambda out: runs.vote_runs(stack, out.numpy().view(np.int64).reshape(2, 5), out[:4], ties="coin", seed=0),
        torch.zeros(20, dtype=torch.int32),
        ValueError,
        "vote_runs: runs overlaps out, expected memory of its own",
    )
