"""What must hold for any input, and what the coins must look like."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import reference
import signvote

seeds = st.integers(0, 2**64 - 1)
implementations = st.sampled_from(signvote.implementations())
undecided = st.sampled_from(["coin", "positive", "negative"])
float_arrays = st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
    lambda dtype: hnp.arrays(dtype, st.integers(0, 300), elements=hnp.from_dtype(np.dtype(dtype)))
)


@st.composite
def word_stacks(draw: st.DrawFn, max_rows: int = 12) -> tuple[NDArray[np.uint32], int]:
    """(M, W) words with arbitrary unused bits, and their numel."""
    numel = draw(st.integers(0, 300))
    shape = (draw(st.integers(1, max_rows)), signvote.num_words(numel))
    return draw(hnp.arrays(np.uint32, shape)), numel


@given(float_arrays, undecided, seeds, implementations)
def test_pack_signs_is_the_reference(x: NDArray[Any], zeros: str, seed: int, implementation: str) -> None:
    words = signvote.pack_signs(x, zeros=zeros, seed=seed, implementation=implementation)
    assert np.array_equal(words, reference.pack_signs(x, zeros, seed)[0])
    assert signvote.has_nonfinite(x, implementation=implementation) == reference.has_nonfinite(x)


@given(word_stacks(), undecided, seeds, implementations)
def test_majority_vote_is_the_reference(
    stack_and_numel: tuple[NDArray[np.uint32], int], ties: str, seed: int, implementation: str
) -> None:
    stack, numel = stack_and_numel
    votes = signvote.majority_vote(stack, numel=numel, ties=ties, seed=seed, implementation=implementation)
    assert np.array_equal(votes, reference.majority_vote(stack, numel, ties, seed)[0])


@given(st.integers(0, 300), st.data(), implementations)
def test_unpacked_words_pack_again(numel: int, data: st.DataObject, implementation: str) -> None:
    words = reference.words_of(data.draw(hnp.arrays(np.bool_, numel)))
    for dtype in (np.float16, np.float32, np.float64):
        y = signvote.unpack_signs(words, numel, dtype=dtype, scale=0.25, implementation=implementation)
        assert np.all(np.abs(y) == 0.25)
        assert np.array_equal(signvote.pack_signs(y, implementation=implementation), words)


@given(word_stacks(), st.randoms(use_true_random=False), undecided, seeds, implementations)
def test_order_of_voters_changes_nothing(
    stack_and_numel: tuple[NDArray[np.uint32], int], random: Any, ties: str, seed: int, implementation: str
) -> None:
    stack, numel = stack_and_numel
    rows: list[NDArray[Any]] = list(stack)
    votes = signvote.majority_vote(rows, numel=numel, ties=ties, seed=seed, implementation=implementation)
    random.shuffle(rows)
    again = signvote.majority_vote(rows, numel=numel, ties=ties, seed=seed, implementation=implementation)
    assert np.array_equal(votes, again)


@given(word_stacks(), implementations)
def test_odd_votes_are_the_sign_of_the_sum(
    stack_and_numel: tuple[NDArray[np.uint32], int], implementation: str
) -> None:
    stack, numel = stack_and_numel
    if len(stack) % 2 == 0:
        stack = stack[1:]
    signs = [signvote.unpack_signs(row, numel, implementation=implementation) for row in stack]
    votes = signvote.majority_vote(stack, numel=numel, implementation=implementation)
    voted = signvote.unpack_signs(votes, numel, implementation=implementation)
    assert np.array_equal(voted, np.sign(np.sum(signs, axis=0)))


@given(word_stacks(), implementations)
def test_opposite_votes_have_the_opposite_outcome(
    stack_and_numel: tuple[NDArray[np.uint32], int], implementation: str
) -> None:
    stack, numel = stack_and_numel
    votes = signvote.majority_vote(stack, numel=numel, ties="positive", implementation=implementation)
    opposite = signvote.majority_vote(~stack, numel=numel, ties="negative", implementation=implementation)
    assert np.array_equal(reference.bits_of(votes, numel), ~reference.bits_of(opposite, numel))


@given(word_stacks(max_rows=1), implementations)
def test_one_voter_decides(stack_and_numel: tuple[NDArray[np.uint32], int], implementation: str) -> None:
    stack, numel = stack_and_numel
    votes = signvote.majority_vote(stack, numel=numel, implementation=implementation)
    assert np.array_equal(votes, reference.words_of(reference.bits_of(stack[0], numel)))


def coins(numel: int, seed: int) -> NDArray[np.float32]:
    return signvote.unpack_signs(signvote.pack_signs(np.zeros(numel, np.float32), seed=seed), numel)


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_coins_are_unbiased(seed: int) -> None:
    numel = 1_000_000
    assert abs(coins(numel, seed).mean()) < 3 / math.sqrt(numel)


@pytest.mark.parametrize("distance", [1, 2, 31, 32, 63, 64, 128])
def test_coins_are_independent_of_their_neighbours(distance: int) -> None:
    flips = coins(1_000_000, 3)
    assert abs(np.mean(flips[distance:] * flips[:-distance])) < 3 / math.sqrt(flips.size - distance)


@pytest.mark.parametrize("other", [4, 3 ^ 1 << 63, 2**64 - 4])
def test_coins_are_independent_of_those_of_other_seeds(other: int) -> None:
    numel = 1_000_000
    assert abs(np.mean(coins(numel, 3) * coins(numel, other))) < 3 / math.sqrt(numel)


def test_coins_of_steps_are_unbiased_at_each_coordinate() -> None:
    # Seeds as a hook derives them: one after the other.
    steps, numel = 4000, 1000
    drift = np.sum([coins(numel, seed) for seed in range(steps)], axis=0)
    # In the mean over the coordinates, and no coordinate farther off than chance allows (5 standard errors).
    assert abs(drift.mean()) < 3 * math.sqrt(steps / numel)
    assert np.abs(drift).max() < 5 * math.sqrt(steps)


@pytest.mark.parametrize("num_rows", [2, 4, 8])
def test_votes_on_noise_have_mean_zero(num_rows: int) -> None:
    numel = 1_000_000
    rng = np.random.default_rng(num_rows)
    rows = [signvote.pack_signs(rng.standard_normal(numel, np.float32)) for _ in range(num_rows)]
    votes = signvote.unpack_signs(signvote.majority_vote(rows, numel=numel), numel)
    assert abs(votes.mean()) < 3 / math.sqrt(numel)
