"""VoteTally against the reference and against the vote on all words at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import reference
import signvote
from samples import Guarded, bit_rows, word_rows
from signvote import VoteTally, _core

SIZES = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 511, 512, 513, 1000]
TIES = ("coin", "positive", "negative")


def random_words(rng: np.random.Generator, numel: int) -> NDArray[np.uint32]:
    """Unused bits are set at random too."""
    return rng.integers(0, 2**32, (numel + 31) // 32, np.uint32)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 8, 15, 16, 17, 64, 255, 256])
@pytest.mark.parametrize("numel", SIZES)
def test_equals_the_vote_on_all_words_at_once(numel: int, num_rows: int, implementation: str) -> None:
    rng = np.random.default_rng(num_rows)
    for ties, bits in zip(("coin", TIES[num_rows % 3]), bit_rows(rng, num_rows, numel), strict=True):
        rows = word_rows(bits, unused=bool(num_rows % 2))
        tally: VoteTally[NDArray[Any]] = VoteTally(numel, num_rows)
        for row in rows:
            tally.add(row, implementation=implementation)
        assert np.array_equal(tally.counts(), bits.sum(axis=0))
        expected = signvote.majority_vote(rows, numel=numel, ties=ties, seed=num_rows)
        assert np.array_equal(tally.decide(ties=ties, seed=num_rows, implementation=implementation), expected)


@given(
    numel=st.integers(0, 700),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=8),
    ties=st.sampled_from(TIES),
    seed=st.integers(0, 2**64 - 1),
    quorum=st.integers(1, 1000),
    parts=st.integers(1, 3),
    implementation=st.sampled_from(signvote.implementations()),
)
def test_weights_merging_and_order(
    numel: int, weights: list[int], ties: str, seed: int, quorum: int, parts: int, implementation: str
) -> None:
    rng = np.random.default_rng(len(weights))
    votes = [(random_words(rng, numel), weight) for weight in weights]
    most = sum(weights)
    counts = reference.counts(votes, numel)
    for order in (list(range(len(votes))), rng.permutation(len(votes)).tolist()):
        tallies: list[VoteTally[NDArray[Any]]] = [VoteTally(numel, most) for _ in range(parts)]
        for place, i in enumerate(order):
            tallies[place % parts].add(*votes[i], implementation=implementation)
        whole: VoteTally[NDArray[Any]] = VoteTally(numel, most)
        for tally in tallies if order[0] % 2 else tallies[::-1]:
            whole.merge(tally, implementation=implementation)
        assert whole.num_votes == most
        assert np.array_equal(whole.counts(), counts)
        words, _ = reference.decide(counts, most, ties, seed)
        assert np.array_equal(whole.decide(ties=ties, seed=seed, implementation=implementation), words)
        ternary = whole.decide(quorum=quorum, implementation=implementation)
        assert np.array_equal(ternary, reference.decide_ternary(counts, most, quorum))


@pytest.mark.parametrize("max_votes", [1, 2, 3, 4, 127, 128, 2**31 - 1])
def test_exact_up_to_the_maximum(max_votes: int) -> None:
    ones, none = np.full(3, 2**32 - 1, np.uint32), np.zeros(3, np.uint32)
    tally: VoteTally[NDArray[Any]] = VoteTally(96, max_votes)
    tally.add(ones, max_votes)
    assert tally.counts().tolist() == [max_votes] * 96
    assert tally.decide().tolist() == ones.tolist()
    assert tally.decide(quorum=max_votes)[1].tolist() == ones.tolist()
    assert tally.decide(quorum=max_votes + 1).tolist() == [none.tolist()] * 2
    expected = f"VoteTally.add: weight is 1 votes, expected at most 0 more of {max_votes}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        tally.add(none)
    other: VoteTally[NDArray[Any]] = VoteTally(96, 5)
    other.add(none, 2)
    with pytest.raises(ValueError, match=r"VoteTally\.merge: other is 2 votes, expected at most 0 more"):
        tally.merge(other)
    assert tally.counts().tolist() == [max_votes] * 96
    assert tally.num_votes == max_votes


def test_memory_is_logarithmic() -> None:
    for max_votes, planes in ((1, 1), (2, 2), (3, 2), (4, 3), (255, 8), (256, 9), (2**31 - 1, 31)):
        assert VoteTally(3200, max_votes)._planes.nbytes == planes * 400


def test_clear() -> None:
    tally: VoteTally[NDArray[Any]] = VoteTally(64, 3)
    for _ in range(2):
        for weight in (2, 1):
            tally.add(np.array([5, 6], np.uint32), weight)
        assert tally.counts().sum() == 3 * 4
        tally.clear()
        assert tally.num_votes == 0


def test_writes_nothing_beyond_its_words(implementation: str) -> None:
    rng = np.random.default_rng(0)
    for numel in SIZES:
        width = (numel + 31) // 32
        planes = Guarded(5 * width, np.uint32, 1)
        planes.array[:] = 0
        words = random_words(rng, numel)
        grid = planes.array.reshape(5, width)
        _core.tally_add(grid, words, 21, implementation)
        _core.tally_merge(grid, np.stack([words, words]), implementation)
        out, both = Guarded(width, np.uint32, 3), Guarded(2 * width, np.uint32, 1)
        counts = reference.counts([(words, 24)], numel)
        tied = _core.tally_decide(grid, 24, numel, "coin", 9, out.array, implementation)
        expected, expected_tied = reference.decide(counts, 24, "coin", 9)
        assert tied == expected_tied
        assert np.array_equal(out.array, expected)
        zeros = _core.tally_decide_ternary(grid, 30, 7, numel, 0, both.array.reshape(2, width), implementation)
        assert zeros == np.sum(abs(2 * counts - 30) < 7)
        assert np.array_equal(both.array.reshape(2, width), reference.decide_ternary(counts, 30, 7))
        assert planes.guards_hold()
        assert out.guards_hold()
        assert both.guards_hold()


@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_threads_change_nothing(num_threads: int, implementation: str) -> None:
    numel = 4_000_001
    rng = np.random.default_rng(1)
    votes = [random_words(rng, numel) for _ in range(3)]

    def tallied(num_threads: int) -> list[NDArray[Any]]:
        chosen: dict[str, Any] = {"implementation": implementation, "num_threads": num_threads}
        tally: VoteTally[NDArray[Any]] = VoteTally(numel, 2**20)
        for i, words in enumerate(votes):
            tally.add(words, 3**i, **chosen)
        whole: VoteTally[NDArray[Any]] = VoteTally(numel, 2**20)
        whole.add(votes[0], 2**19 - 13, **chosen)
        whole.merge(tally, **chosen)
        return [whole.planes, whole.decide(seed=5, **chosen), whole.decide(quorum=2**19 - 20, **chosen)]

    for found, expected in zip(tallied(num_threads), tallied(1), strict=True):
        assert np.array_equal(found, expected)


def test_tensors() -> None:
    rng = np.random.default_rng(2)
    rows = torch.from_numpy(rng.integers(-(2**31), 2**31, (4, 5), np.int32))
    tally: VoteTally[torch.Tensor] = VoteTally(150, 4)
    for row in rows:
        tally.add(row)
    counts = tally.counts()
    assert counts.dtype == torch.int32
    assert counts.tolist() == reference.counts([(row.numpy().view(np.uint32), 1) for row in rows], 150).tolist()
    out = torch.empty(5, dtype=torch.int32)
    assert tally.decide(seed=3, out=out) is out
    assert torch.equal(out, signvote.majority_vote(rows, numel=150, seed=3))
    assert tally.decide(quorum=2).shape == (2, 5)


W = np.zeros(4, np.uint32)

MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "numel": (lambda: VoteTally(-1, 1), ValueError, "VoteTally: numel is -1, expected an integer from 0 to 2**63 - 1"),
    "no votes": (lambda: VoteTally(9, 0), ValueError, "VoteTally: max_votes is 0, expected an integer from 1 to 2**31"),
    "float": (lambda: VoteTally(9, 1.5), TypeError, "VoteTally: max_votes is 1.5, expected an integer"),  # type: ignore[arg-type]
    "size": (lambda: one().add(W[1:]), ValueError, "tally_add: words has 3 words, expected 4"),
    "dtype": (lambda: one().add(W.astype(np.uint64)), TypeError, "tally_add: words is dtype('uint64'), expected"),
    "kind": (
        lambda: one().add(torch.zeros(4, dtype=torch.int32)),  # type: ignore[arg-type]
        TypeError,
        "VoteTally.add: words is a Tensor, expected a NumPy array like the other arguments",
    ),
    "list": (lambda: one().add([1]), TypeError, "VoteTally.add: words is a list, expected a NumPy array"),  # type: ignore[arg-type]
    "weight": (lambda: one().add(W, 0), ValueError, "VoteTally.add: weight is 0, expected an integer from 1"),
    "too many": (lambda: one().add(W, 7), ValueError, "VoteTally.add: weight is 7 votes, expected at most 6 more of 7"),
    "itself": (lambda: merge_itself(), ValueError, "VoteTally.merge: other is this tally itself, expected another"),
    "merge": (lambda: one().merge(W), TypeError, "VoteTally.merge: other is a ndarray, expected a VoteTally"),  # type: ignore[arg-type]
    "other": (
        lambda: one().merge(VoteTally(9, 7)),
        ValueError,
        "VoteTally.merge: other has 9 coordinates, expected 100",
    ),
    "early": (
        lambda: VoteTally(9, 1).decide(),
        ValueError,
        "VoteTally.decide: the tally has 0 votes, expected 1 or more",
    ),
    "ties": (lambda: one().decide(ties="zero"), ValueError, "tally_decide: ties is 'zero', expected 'coin'"),
    "seed": (lambda: one().decide(seed=-1), ValueError, "tally_decide: seed is -1, expected an integer"),
    "quorum": (lambda: one().decide(quorum=0), ValueError, "VoteTally.decide: quorum is 0, expected an integer from 1"),
    "out": (lambda: one().decide(out=W[1:]), ValueError, "tally_decide: out has 3 words, expected 4"),
    "out of quorum": (
        lambda: one().decide(quorum=1, out=np.zeros((3, 4), np.uint32)),
        ValueError,
        "tally_decide_ternary: out has shape (3, 4), expected (2, 4)",
    ),
}


def one() -> VoteTally[NDArray[Any]]:
    tally: VoteTally[NDArray[Any]] = VoteTally(100, 7)
    tally.add(W)
    return tally


def merge_itself() -> None:
    tally = one()
    tally.merge(tally)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors(mistake: str) -> None:
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


def test_errors_of_the_native_module() -> None:
    planes, out = np.zeros((3, 4), np.uint32), np.zeros(4, np.uint32)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: _core.tally_add(planes, planes[0], 1, "portable"), "tally_add: planes overlaps words"),
        (
            lambda: _core.tally_add(planes, out, 8, "portable"),
            "tally_add: weight is 8, expected an integer from 1 to 7",
        ),
        (lambda: _core.tally_add(planes[:, 1:], out[1:], 1, "portable"), "tally_add: planes is not contiguous"),
        (lambda: _core.tally_add(planes[:0], out, 1, "portable"), "tally_add: planes has 0 planes, expected 1 to 32"),
        (
            lambda: _core.tally_merge(planes[:2], np.zeros((3, 4), np.uint32), "portable"),
            "tally_merge: others has shape",
        ),
        (lambda: _core.tally_merge(planes, planes[1:], "portable"), "tally_merge: planes overlaps others"),
        (
            lambda: _core.tally_decide(planes, 8, 100, "coin", 0, out, "portable"),
            "tally_decide: num_votes is 8, expected an integer from 1 to 7",
        ),
        (
            lambda: _core.tally_decide(planes, 1, 129, "coin", 0, out, "portable"),
            "tally_decide: planes has 4 words in a plane, expected 5 for numel 129",
        ),
        (
            lambda: _core.tally_decide(planes, 1, 100, "coin", 0, planes[1], "portable"),
            "tally_decide: out overlaps planes",
        ),
        (
            lambda: _core.tally_decide(planes, 1, np.array([[0, 0, 129, 0, 0]]), "coin", 0, out, "portable"),
            "tally_decide: runs has word 0 and numel 129 in row 0, expected a range within 4 words",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            call()
    planes.flags.writeable = False
    with pytest.raises(ValueError, match="tally_add: planes is read-only"):
        _core.tally_add(planes, out, 1, "portable")
