"""The ops over runs: any layout of a bucket and its message against the reference, and against the ops on the whole."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import reference
import signvote
from samples import mixture, values
from signvote import _core, ops, runs

SIGNUM = (0.9, 1 - 0.9, 0.9, 1 - 0.9)
TORCH_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
SENTINEL = 0x5A5A5A5A


def as_tensor(stored: NDArray[Any], dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(stored.view(np.int16) if dtype == "bfloat16" else stored)
    return tensor.view(TORCH_DTYPES[dtype])


def bucket_layout(rng: np.random.Generator, sizes: list[int]) -> tuple[runs.Runs, int, int]:
    """Runs of parameters of these sizes in random order, with gaps, some cut in two; numel of bucket and message."""
    rows = []
    coordinate, word = int(rng.integers(0, 3)), 0
    for place in rng.permutation(len(sizes)):
        cuts = [0, sizes[place]]
        if sizes[place] > 64 and rng.integers(0, 2):
            cuts.insert(1, int(rng.integers(1, (sizes[place] - 1) // 64 + 1)) * 64)
        for first, end in pairwise(cuts):
            rows.append((place, first, end - first, coordinate + first, word + first // 32))
        coordinate += sizes[place] + int(rng.integers(0, 3))
        word += (sizes[place] + 63) // 64 * 2
    return np.array(rows, np.int64).reshape(-1, 5), coordinate, word


layouts = st.tuples(st.integers(0, 2**32), st.lists(st.integers(0, 400), max_size=6))
dtypes = st.sampled_from(sorted(TORCH_DTYPES))
implementations = st.sampled_from(signvote.implementations())
undecided = st.sampled_from(["coin", "positive", "negative"])
seeds = st.integers(0, 2**64 - 1)


@given(layouts, dtypes, st.booleans(), undecided, seeds, implementations)
def test_pack_runs(
    layout: tuple[int, list[int]], dtype: str, with_momentum: bool, zeros: str, seed: int, implementation: str
) -> None:
    rng = np.random.default_rng(layout[0])
    table, numel, width = bucket_layout(rng, layout[1])
    stored = mixture(rng, numel, dtype)
    start = rng.standard_normal(numel).astype(np.float64 if dtype == "float64" else np.float32)
    momentum = torch.from_numpy(start.copy()) if with_momentum else None
    expected_momentum = start.copy() if with_momentum else None
    out = torch.full((width,), SENTINEL, dtype=torch.int32)
    counts = runs.pack_runs(
        as_tensor(stored, dtype), momentum, SIGNUM, table, out, zeros=zeros, seed=seed, implementation=implementation
    )
    # What belongs to no run is left as it was, in the momentum and in the words.
    expected = np.full(width, SENTINEL, np.uint32)
    assert counts == reference.pack_runs(values(stored, dtype), expected_momentum, SIGNUM, table, expected, zeros, seed)
    assert np.array_equal(out.numpy().view(np.uint32), expected)
    if momentum is not None and expected_momentum is not None:
        assert np.array_equal(momentum.numpy(), expected_momentum)


@given(layouts, st.integers(1, 9), undecided, seeds, implementations)
def test_vote_runs(layout: tuple[int, list[int]], num_rows: int, ties: str, seed: int, implementation: str) -> None:
    rng = np.random.default_rng(layout[0])
    table, _, width = bucket_layout(rng, layout[1])
    # Rows as they arrive: with something behind the words, as a trailer.
    received = torch.from_numpy(rng.integers(-(2**31), 2**31, (num_rows, width + 3), dtype=np.int32))
    rows = received[:, :width]
    expected = np.full(width, SENTINEL, np.uint32)
    tied = reference.vote_runs(list(rows.numpy().view(np.uint32)), table, expected, ties, seed)
    for given_rows in (rows, list(rows)):
        out = torch.full((width,), SENTINEL, dtype=torch.int32)
        assert runs.vote_runs(given_rows, table, out, ties=ties, seed=seed, implementation=implementation) == tied
        assert np.array_equal(out.numpy().view(np.uint32), expected)


@given(layouts, dtypes, st.sampled_from([1.0, -2.0, 0.0, 0.5]), implementations)
def test_unpack_runs(layout: tuple[int, list[int]], dtype: str, scale: float, implementation: str) -> None:
    rng = np.random.default_rng(layout[0])
    table, numel, width = bucket_layout(rng, layout[1])
    words = rng.integers(0, 2**32, width, dtype=np.uint32)
    bucket = torch.full((numel,), 7.0, dtype=TORCH_DTYPES[dtype])
    expected = np.full(numel, 7.0)
    reference.unpack_runs(words, table, expected, np.float64(scale))
    runs.unpack_runs(torch.from_numpy(words.view(np.int32)), table, bucket, scale=scale, implementation=implementation)
    assert np.array_equal(bucket.double().numpy(), expected)


@given(st.integers(0, 1000), st.lists(st.integers(0, 15), max_size=5), st.booleans(), seeds, implementations)
def test_pieces_equal_the_whole(
    numel: int, blocks: list[int], with_momentum: bool, seed: int, implementation: str
) -> None:
    # One parameter, cut at multiples of 64.
    cuts = sorted({0, numel, *(64 * block for block in blocks if 64 * block < numel)})
    pieces = np.array([(5, a, b - a, a, a // 32) for a, b in pairwise(cuts)], np.int64).reshape(-1, 5)
    rng = np.random.default_rng(numel)
    x = torch.from_numpy(mixture(rng, numel, "float32"))
    start = torch.from_numpy(rng.standard_normal(numel).astype(np.float32)) if with_momentum else None
    width = signvote.num_words(numel)
    run_seed = _core.mix((seed + 5) % 2**64)

    whole_momentum = None if start is None else start.clone()
    if whole_momentum is None:
        whole = signvote.pack_signs(x, seed=run_seed)
    else:
        whole = ops.pack_momentum(x, whole_momentum, coefficients=SIGNUM, seed=run_seed)
    momentum = None if start is None else start.clone()
    out = torch.empty(width, dtype=torch.int32)
    runs.pack_runs(x, momentum, SIGNUM, pieces, out, zeros="coin", seed=seed, implementation=implementation)
    assert torch.equal(out, whole)
    if momentum is not None and whole_momentum is not None:
        assert torch.equal(momentum, whole_momentum)

    stack = torch.stack([whole, ~whole])
    whole_votes = signvote.majority_vote(stack, numel=numel, seed=run_seed)
    runs.vote_runs(stack, pieces, out, ties="coin", seed=seed, implementation=implementation)
    assert torch.equal(out, whole_votes)

    y = torch.empty(numel)
    runs.unpack_runs(whole_votes, pieces, y, scale=0.5, implementation=implementation)
    assert torch.equal(y, signvote.unpack_signs(whole_votes, numel, scale=0.5))


def test_layout_changes_no_bit() -> None:
    # The same parameters in two layouts, as before and after DDP rebuilds its buckets.
    sizes = [1, 64, 65, 300, 7, 129]
    rng = np.random.default_rng(0)
    parameters = [torch.zeros(size) for size in sizes]
    found: list[dict[int, list[int]]] = []
    for _ in range(2):
        table, numel, width = bucket_layout(rng, sizes)
        bucket = torch.zeros(numel)
        out = torch.zeros(width, dtype=torch.int32)
        runs.pack_runs(bucket, None, SIGNUM, table, out, zeros="coin", seed=11)
        bits: dict[int, list[int]] = {}
        for place, _, size, _, word in sorted(table.tolist()):
            words = out.numpy().view(np.uint32)[word : word + (size + 31) // 32]
            bits.setdefault(place, []).extend(reference.bits_of(words, size).tolist())
        found.append(bits)
    assert found[0] == found[1]
    for place, parameter in enumerate(parameters):
        assert found[0][place] == reference.coins(reference.run_seed(11, place), parameter.numel()).tolist()


@pytest.mark.parametrize("place", [0, 1, 2**62])
def test_seed_of_a_run_wraps(place: int) -> None:
    seed = 2**64 - 1
    table = np.array([[place, 64, 100, 0, 0]])
    out = torch.zeros(4, dtype=torch.int32)
    runs.pack_runs(torch.zeros(100), None, SIGNUM, table, out, zeros="coin", seed=seed)
    expected = reference.words_of(reference.coins(reference.run_seed(seed, place), 100, first=64))
    assert np.array_equal(out.numpy().view(np.uint32), expected)


def test_no_runs() -> None:
    table = np.empty((0, 5), np.int64)
    out = torch.full((2,), SENTINEL, dtype=torch.int32)
    assert runs.pack_runs(torch.ones(3), None, SIGNUM, table, out, zeros="coin", seed=0) == (0, 0)
    assert runs.vote_runs(torch.zeros(2, 2, dtype=torch.int32), table, out, ties="coin", seed=0) == 0
    bucket = torch.full((3,), 7.0)
    runs.unpack_runs(out, table, bucket)
    assert bucket.tolist() == [7, 7, 7]
    assert out.tolist() == [SENTINEL] * 2
