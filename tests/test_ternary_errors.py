"""Bad input to the ops with abstention raises the documented error, and nothing is written."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import signvote
from bad_input import COORDINATES, NX, SENTINEL, X, check, described, misaligned, read_only, row
from signvote import VoteTally, _core, runs

PLANES = signvote.pack_ternary(X)
STACK = torch.stack([PLANES, PLANES])


def planes(width: int = 4) -> torch.Tensor:
    return torch.full((2, width), SENTINEL, dtype=torch.int32)


def numpy_planes(width: int = 4) -> Any:
    return np.full((2, width), SENTINEL, np.uint32)


@pytest.mark.parametrize(("x", "error", "message"), COORDINATES)
def test_coordinates(x: Any, error: type[Exception], message: str) -> None:
    out = planes() if isinstance(x, torch.Tensor) else numpy_planes()
    check(lambda out: signvote.pack_ternary(x, out=out), out, error, f"pack_ternary: {message}")


@pytest.mark.parametrize(
    ("threshold", "error", "message"),
    described(
        (-1e-300, ValueError, "threshold is -1e-300, expected a number that is not negative"),
        (float("nan"), ValueError, "threshold is nan, expected a number that is not negative"),
        (float("-inf"), ValueError, "threshold is -inf, expected a number that is not negative"),
        (-(10**400), ValueError, "threshold is -inf, expected a number that is not negative"),
        ("rms", TypeError, "threshold is 'rms', expected a number"),
        (None, TypeError, "threshold is None, expected a number"),
    ),
)
def test_threshold(threshold: Any, error: type[Exception], message: str) -> None:
    check(
        lambda out: signvote.pack_ternary(X, threshold=threshold, out=out), planes(), error, f"pack_ternary: {message}"
    )
    out = torch.full((8,), SENTINEL, dtype=torch.int32)
    check(
        lambda out: runs.pack_ternary_runs(X, row(), out, stride=4, threshold=threshold),
        out,
        error,
        f"pack_ternary_runs: {message}",
    )


@pytest.mark.parametrize(
    ("out", "error", "message"),
    described(
        (planes(3), ValueError, "out has shape (2, 3), expected (2, 4)"),
        (planes(5), ValueError, "out has shape (2, 5), expected (2, 4)"),
        (planes()[0], ValueError, "out has shape (4,), expected (2, 4)"),
        (torch.stack([planes()[0]] * 3), ValueError, "out has shape (3, 4), expected (2, 4)"),
        (planes(8)[:, ::2], ValueError, "out is not contiguous, expected rows of contiguous words"),
        (planes()[0].expand(2, 4), ValueError, "out overlaps itself, expected memory of its own"),
        (torch.arange(7, dtype=torch.int32).as_strided((2, 4), (3, 1)), ValueError, "out overlaps itself"),
        (planes().long(), TypeError, "out is torch.int64, expected int32 words"),
        (numpy_planes(), TypeError, "out is a ndarray, expected a torch tensor like the other arguments"),
        (planes().to("meta"), ValueError, "out is on device meta, expected cpu"),
    ),
)
def test_planes_out(out: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^pack_ternary: " + re.escape(message)):
        signvote.pack_ternary(X, out=out)
    with pytest.raises(error, match="^majority_vote_ternary: " + re.escape(message)):
        signvote.majority_vote_ternary(STACK, out=out)


def test_numpy_planes_out() -> None:
    stack = STACK.numpy().view(np.uint32)
    for out, message in (
        (read_only(numpy_planes()), "out is read-only, expected a writable array"),
        (misaligned(numpy_planes().reshape(-1)).reshape(2, 4), "out is not aligned, expected addresses"),
        (np.full((2, 4), 0, ">u4"), "out is dtype('>u4'), expected uint32 (NumPy) or int32 (torch) words"),
    ):
        error = TypeError if "u4" in message else ValueError
        check(lambda out: signvote.pack_ternary(NX, out=out), out, error, f"pack_ternary: {message}")
        check(
            lambda out: signvote.majority_vote_ternary(stack, out=out), out, error, f"majority_vote_ternary: {message}"
        )


@pytest.mark.parametrize("place", [0, 1])
def test_overlap_of_planes(place: int) -> None:
    # Either plane of the result in either plane of what is read.
    memory = torch.zeros(2, 4 * 32, dtype=torch.int32)
    x = memory.view(torch.float32).view(-1)[:128]
    out = memory[:, :4]
    check(lambda out: signvote.pack_ternary(x, out=out), out, ValueError, "pack_ternary: out overlaps x")
    stack = torch.zeros(3, 2, 4, dtype=torch.int32)
    out = torch.as_strided(stack, (2, 4), (4 * (2 * place + 1), 1), 4)
    message = "majority_vote_ternary: out overlaps stack, expected memory of its own"
    check(lambda out: signvote.majority_vote_ternary(stack, out=out), out, ValueError, message)
    check(lambda out: signvote.majority_vote_ternary(list(stack), out=out), out, ValueError, message)
    y = stack.view(torch.float32).view(-1)[4 * place : 4 * place + 4]
    padded = torch.as_strided(stack, (2, 1), (4, 1))
    check(lambda out: signvote.unpack_ternary(padded, 4, out=out), y, ValueError, "unpack_ternary: out overlaps planes")


@pytest.mark.parametrize(
    ("stack", "error", "message"),
    described(
        ([], ValueError, "stack has 0 rows, expected 1 to 65535"),
        (STACK[:0], ValueError, "stack has 0 rows, expected 1 to 65535"),
        (PLANES.expand(65536, 2, 4), ValueError, "stack has 65536 rows, expected 1 to 65535"),
        (PLANES, ValueError, "stack has shape (2, 4), expected (M, 2, W)"),
        (torch.zeros(2, 3, 4, dtype=torch.int32), ValueError, "stack has shape (2, 3, 4), expected (M, 2, W)"),
        (torch.zeros(1, 2, 2, 4, dtype=torch.int32), ValueError, "stack has shape (1, 2, 2, 4), expected (M, 2, W)"),
        (torch.zeros(2, 2, 8, dtype=torch.int32)[..., ::2], ValueError, "stack is not contiguous, expected rows of"),
        (STACK.long(), TypeError, "stack is torch.int64, expected int32 words"),
        ([PLANES, PLANES[:, :3]], ValueError, "stack[1] has shape (2, 3), expected (2, 4)"),
        ([PLANES[0], PLANES[1]], ValueError, "stack[0] has shape (4,), expected (2, W)"),
        (
            [PLANES, PLANES.numpy()],
            TypeError,
            "stack[1] is a ndarray, expected a torch tensor like the other arguments",
        ),
        ("planes", TypeError, "stack is a str, expected a NumPy array or a torch tensor"),
    ),
)
def test_stack(stack: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^majority_vote_ternary: " + re.escape(message)):
        signvote.majority_vote_ternary(stack)


@pytest.mark.parametrize(
    ("quorum", "error", "message"),
    described(
        (0, ValueError, "quorum is 0, expected an integer from 1 on"),
        (-1, ValueError, "quorum is -1, expected an integer from 0 to 2**64 - 1"),
        (2**64, ValueError, "quorum is 18446744073709551616, expected an integer from 0 to 2**64 - 1"),
        (0.5, TypeError, "quorum is 0.5, expected an integer"),
        (None, TypeError, "quorum is None, expected an integer"),
    ),
)
def test_quorum(quorum: Any, error: type[Exception], message: str) -> None:
    out = planes()
    message = f"majority_vote_ternary: {message}"
    check(lambda out: signvote.majority_vote_ternary(STACK, quorum=quorum, out=out), out, error, message)


@pytest.mark.parametrize("numel", [0, 96, 129, 2**62])
def test_numel_that_the_planes_do_not_hold(numel: int) -> None:
    width = (numel + 31) // 32
    message = f"majority_vote_ternary: stack has 4 words in a plane, expected {width} for numel {numel}"
    check(lambda out: signvote.majority_vote_ternary(STACK, numel=numel, out=out), planes(), ValueError, message)
    with pytest.raises(
        ValueError, match=re.escape(f"planes has shape (2, 4), expected (2, {width}) for numel {numel}")
    ):
        signvote.unpack_ternary(PLANES, numel)
    with pytest.raises(ValueError, match=re.escape("unpack_ternary: planes has shape (4,), expected (2, 4)")):
        signvote.unpack_ternary(PLANES[0], 100)


def test_the_rest_of_unpack_ternary() -> None:
    for options, error, message in (
        ({"scale": float("inf")}, ValueError, "scale is inf, expected a number that is finite in float32"),
        ({"dtype": torch.int32}, TypeError, "dtype is torch.int32, expected torch's float32"),
        ({"out": torch.zeros(99)}, ValueError, "out has 99 coordinates, expected 100"),
        ({"out": torch.zeros(200)[::2]}, ValueError, "out is not contiguous"),
        ({"out": torch.zeros(100), "dtype": torch.float64}, TypeError, "out is torch.float32, expected torch.float64"),
        ({"implementation": "sse9"}, ValueError, "implementation is 'sse9', expected one of "),
        ({"num_threads": 0}, ValueError, "num_threads is 0, expected an integer from 1"),
    ):
        with pytest.raises(error, match="^unpack_ternary: " + re.escape(message)):
            signvote.unpack_ternary(PLANES, 100, **options)


def test_runs() -> None:
    out = torch.full((9,), SENTINEL, dtype=torch.int32)
    rows = torch.zeros(2, 9, dtype=torch.int32)
    tally: VoteTally[torch.Tensor] = VoteTally(160, 1, ternary=True)
    tally.add(torch.zeros(2, 5, dtype=torch.int32))
    bucket = torch.zeros(100)

    def each(table: Any, stride: Any, error: type[Exception], message: str) -> None:
        check(
            lambda out: runs.pack_ternary_runs(bucket, table, out, stride=stride),
            out,
            error,
            f"pack_ternary_runs: {message}",
        )
        check(
            lambda out: runs.vote_ternary_runs(rows, table, out, stride=stride),
            out,
            error,
            f"vote_ternary_runs: {message}",
        )
        check(
            lambda out: tally.decide_ternary_runs(table, out, stride=stride),
            out,
            error,
            f"tally_decide_ternary: {message}",
        )
        check(
            lambda bucket: runs.unpack_ternary_runs(out, table, stride, bucket),
            bucket,
            error,
            f"unpack_ternary_runs: {message}",
        )

    each(row(), 10, ValueError, "stride is 10, expected at most 9")
    each(row(), -1, ValueError, "stride is -1, expected an integer from 0 to")
    each(row(), "5", TypeError, "stride is '5', expected an integer")
    each(row(), 3, ValueError, "stride is 3, expected 4 or more, as row 0 of runs has so many words")
    each(row(word=1), 6, ValueError, "runs has word 1 and numel 100 in row 0, expected a range within 3 words")
    each(row(word=2), 4, ValueError, "runs has word 2 and numel 100 in row 0, expected a range within")
    each(row(word=-1), 5, ValueError, "runs has word -1 and numel 100 in row 0, expected a range within 4")
    each(row().astype(np.int32), 4, TypeError, "runs is dtype('int32'), expected int64")

    words = torch.full((8,), SENTINEL, dtype=torch.int32)
    check(
        lambda words: runs.vote_ternary_runs(rows, row(), words, stride=4),
        words,
        ValueError,
        "vote_ternary_runs: out has 8 words, expected 9",
    )
    check(
        lambda out: runs.vote_ternary_runs(rows, row(), out, stride=4, quorum=0),
        out,
        ValueError,
        "vote_ternary_runs: quorum is 0, expected an integer from 1 on",
    )
    check(
        lambda out: tally.decide_ternary_runs(row(), out, stride=4, quorum=0),
        out,
        ValueError,
        "VoteTally.decide_ternary_runs: quorum is 0, expected an integer from 1 to 2**63 - 1",
    )
    check(
        lambda rows: runs.vote_ternary_runs(rows, row(), rows[1], stride=4),
        rows,
        ValueError,
        "vote_ternary_runs: out overlaps rows",
    )
    with pytest.raises(ValueError, match=r"^pack_ternary_runs: runs has coordinate 1 and numel 100 in row 0"):
        runs.pack_ternary_runs(bucket, row(coordinate=1), out, stride=4)


def test_tallies() -> None:
    tally: VoteTally[torch.Tensor] = VoteTally(100, 5, ternary=True)
    for votes, error, message in (
        (PLANES[0], ValueError, "tally_add_ternary: words has shape (4,), expected (2, 4)"),
        (planes(5), ValueError, "tally_add_ternary: words has shape (2, 5), expected (2, 4)"),
        (planes(8)[:, ::2], ValueError, "tally_add_ternary: words is not contiguous"),
        (PLANES.long(), TypeError, "VoteTally.add: words is torch.int64, expected int32 words"),
    ):
        with pytest.raises(error, match="^" + re.escape(message)):
            tally.add(votes)
    assert tally.num_votes == 0
    with pytest.raises(ValueError, match=r"^VoteTally\.decide: the tally has 0 votes, expected 1 or more"):
        tally.decide()
    tally.add(PLANES, 5)
    with pytest.raises(ValueError, match=r"^VoteTally\.add: weight is 1 votes, expected at most 0 more of 5"):
        tally.add(PLANES)
    binary: VoteTally[torch.Tensor] = VoteTally(100, 5)
    binary.add(PLANES[0])
    with pytest.raises(ValueError, match=r"^VoteTally\.merge: other has ternary True, expected False"):
        binary.merge(tally)
    with pytest.raises(ValueError, match=r"^VoteTally\.merge: other has ternary False, expected True"):
        tally.merge(binary)
    with pytest.raises(ValueError, match=r"^tally_add: words has 2 dimensions, expected 1"):
        binary.add(PLANES)
    counters = np.zeros((3, 4), np.uint32)
    with pytest.raises(ValueError, match="tally_add_ternary: planes overlaps words"):
        _core.tally_add_ternary(counters, counters[1:], 1, "portable")
    with pytest.raises(ValueError, match="tally_add_ternary: weight is 8, expected an integer from 1 to 7"):
        _core.tally_add_ternary(counters, numpy_planes(), 8, "portable")
