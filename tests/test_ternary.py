"""The ops with abstention from Python: arrays and tensors, runs, VoteTally, and what holds whatever the input is."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import reference
import signvote
from samples import DTYPES, mixture, store, ternary_rows, values
from signvote import VoteTally, runs
from signvote.arguments import TORCH_DTYPES_BY_NAME, threshold_bits
from test_ops_runs import SENTINEL, as_tensor, bucket_layout, dtypes, implementations, layouts

NumpyTally = VoteTally[NDArray[Any]]

seeds = st.integers(0, 2**32)


def as_words(words: NDArray[np.uint32]) -> torch.Tensor:
    return torch.from_numpy(words.view(np.int32))


def random_votes(rng: np.random.Generator, numel: int, num_rows: int) -> NDArray[np.int64]:
    """Rows of 1, 0 and -1."""
    return rng.integers(-1, 2, (num_rows, numel))


def planes_of(votes: NDArray[np.int64]) -> NDArray[np.uint32]:
    return np.stack([reference.planes_of(row) for row in votes])


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_tensors_agree(dtype: str) -> None:
    rng = np.random.default_rng(0)
    stored = np.stack([mixture(rng, 6 * 35, dtype) for _ in range(3)])
    workers = [as_tensor(row, dtype).reshape(6, 35) for row in stored]
    expected = [reference.pack_ternary(values(row, dtype), 0.7)[0] for row in stored]
    for worker, planes in zip(workers, expected, strict=True):
        assert torch.equal(signvote.pack_ternary(worker, threshold=0.7), as_words(planes))
        out = torch.empty(2, 7, dtype=torch.int32)
        assert signvote.pack_ternary(worker, threshold=0.7, out=out) is out
        assert torch.equal(out, as_words(planes))
    voted, _ = reference.majority_vote_ternary(expected, 210, 2)
    stack = torch.stack([as_words(planes) for planes in expected])
    stacks: list[Any] = [stack, list(stack), tuple(stack)]
    for rows in stacks:
        assert torch.equal(signvote.majority_vote_ternary(rows, quorum=2, numel=210), as_words(voted))
    y = signvote.unpack_ternary(as_words(voted), 210, dtype=TORCH_DTYPES_BY_NAME[dtype], scale=-0.5)
    assert y.dtype is TORCH_DTYPES_BY_NAME[dtype]
    assert np.array_equal(y.double().numpy(), reference.unpack_ternary(voted, 210, np.float64(-0.5)))
    if dtype == "bfloat16":
        return
    arrays = [row.reshape(6, 35) for row in stored]
    planes = np.stack([signvote.pack_ternary(array, threshold=0.7) for array in arrays])
    assert np.array_equal(planes, expected)
    result = signvote.majority_vote_ternary(planes, quorum=2, numel=210)
    assert result.dtype == np.uint32
    assert np.array_equal(result, voted)
    coordinates = np.empty((30, 7), dtype)
    assert signvote.unpack_ternary(result, 210, scale=-0.5, out=coordinates) is coordinates
    assert np.array_equal(coordinates.reshape(-1), y.numpy())
    assert not np.any(np.signbit(coordinates) & (coordinates == 0))


@given(numel=st.integers(0, 700), dtype=dtypes, seed=seeds, implementation=implementations)
def test_abstention_is_a_vote_for_zero(numel: int, dtype: str, seed: int, implementation: str) -> None:
    rng = np.random.default_rng(seed)
    x = mixture(rng, numel, dtype)
    threshold = float(rng.choice([0.0, 0.1, 1.0]))
    tensor = as_tensor(x, dtype)
    planes = signvote.pack_ternary(tensor, threshold=threshold, implementation=implementation)
    y = signvote.unpack_ternary(planes, numel, implementation=implementation)
    wide = tensor.double()
    expected = torch.where(wide.abs() > threshold, wide.sign(), 0.0).nan_to_num(0.0)
    assert torch.equal(y.double(), expected)


@given(numel=st.integers(0, 700), num_rows=st.integers(1, 40), seed=seeds, implementation=implementations)
def test_votes(numel: int, num_rows: int, seed: int, implementation: str) -> None:
    rng = np.random.default_rng(seed)
    votes = random_votes(rng, numel, num_rows)
    rows = planes_of(votes)
    chosen: dict[str, Any] = {"numel": numel, "implementation": implementation}

    # Who votes first changes nothing, nor does who abstains from everything, and the negative of all votes is that of
    # the result.
    for quorum in {1, 2, int(rng.integers(1, num_rows + 2))}:
        result = signvote.majority_vote_ternary(rows, quorum=quorum, **chosen)
        shuffled = rows[rng.permutation(num_rows)]
        assert np.array_equal(signvote.majority_vote_ternary(shuffled, quorum=quorum, **chosen), result)
        more: NDArray[np.uint32] = np.concatenate([rows, np.zeros_like(rows)])
        assert np.array_equal(signvote.majority_vote_ternary(more, quorum=quorum, **chosen), result)
        opposite = signvote.majority_vote_ternary(planes_of(-votes), quorum=quorum, **chosen)
        found = reference.ternary_of(result, numel)
        assert np.array_equal(reference.ternary_of(opposite, numel), -found)
        tally: NumpyTally = VoteTally(numel, num_rows, ternary=True)
        for row in rows:
            tally.add(row, implementation=implementation)
        assert np.array_equal(tally.decide(quorum=quorum, implementation=implementation), result)

    # No one abstains: an odd number has a majority.
    signs: NDArray[np.int64] = np.where(votes >= 0, 1, -1)
    odd = signs[: num_rows - (num_rows + 1) % 2]
    sign, active = signvote.majority_vote_ternary(planes_of(odd), **chosen)
    assert np.array_equal(active, reference.words_of(np.ones(numel, bool)))
    assert np.array_equal(sign, signvote.majority_vote(planes_of(odd)[:, 0], **chosen))
    # And a quorum of all of them is for the unanimous.
    unanimous = np.where(abs(signs.sum(axis=0)) == num_rows, signs[0], 0)
    result = signvote.majority_vote_ternary(planes_of(signs), quorum=num_rows, **chosen)
    assert np.array_equal(result, reference.planes_of(unanimous))


def test_quorum_and_abstention() -> None:
    # Columns: everyone abstains; one vote; a tie; +2; +3; -1 of three; -3.
    votes = np.array([[0, 1, 1, 1, 1, -1, -1], [0, 0, -1, 1, 1, 1, -1], [0, 0, 0, 0, 1, -1, -1]])
    expected = {
        1: [0, 1, 0, 1, 1, -1, -1],
        2: [0, 0, 0, 1, 1, 0, -1],
        3: [0, 0, 0, 0, 1, 0, -1],
        4: [0] * 7,
        2**63 - 1: [0] * 7,
    }
    for quorum, result in expected.items():
        planes = signvote.majority_vote_ternary(planes_of(votes), quorum=quorum)
        assert signvote.unpack_ternary(planes, 7, scale=1).tolist()[:7] == result


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_threshold_is_not_rounded(dtype: str) -> None:
    # 0.1 lies between two values of every dtype, and 1 is one of them.
    values_near = np.array([0.1, 1.0])
    below = values(store(values_near, dtype), dtype).astype(float)
    for threshold, near in zip((0.1, 1.0), below, strict=True):
        bits = threshold_bits("op", threshold, dtype)
        bound = _value_of(bits, dtype)
        assert bound <= threshold < _value_of(bits + 1, dtype)
        assert near in (bound, _value_of(bits + 1, dtype))
    largest = float(torch.finfo(TORCH_DTYPES_BY_NAME[dtype]).max)
    x = torch.tensor([largest, math.inf, -math.inf, math.nan], dtype=torch.float64).to(TORCH_DTYPES_BY_NAME[dtype])
    found = {
        threshold: signvote.unpack_ternary(signvote.pack_ternary(x, threshold=threshold), 4).tolist()
        for threshold in (math.nextafter(largest, 0), largest, 1.7e308, math.inf, 10**400)
    }
    assert found[math.nextafter(largest, 0)] == [1, 1, -1, 0]
    assert found[largest] == [0, 1, -1, 0]
    assert found[1.7e308] == [float(dtype == "float64"), 1, -1, 0]
    assert found[math.inf] == found[10**400] == [0, 0, 0, 0]


def _value_of(bits: int, dtype: str) -> float:
    unsigned = {8: np.uint64, 4: np.uint32, 2: np.uint16}[torch.finfo(TORCH_DTYPES_BY_NAME[dtype]).bits // 8]
    stored = np.array([bits], unsigned)
    return float(values(stored if dtype == "bfloat16" else stored.view(dtype), dtype)[0])


@given(layouts, dtypes, st.sampled_from([0.0, 0.1, 1.5]), st.integers(0, 5), implementations)
def test_pack_ternary_runs(
    layout: tuple[int, list[int]], dtype: str, threshold: float, gap: int, implementation: str
) -> None:
    rng = np.random.default_rng(layout[0])
    table, numel, width = bucket_layout(rng, layout[1])
    stride = width + gap
    stored = mixture(rng, numel, dtype)
    out = torch.full((stride + width + 1,), SENTINEL, dtype=torch.int32)
    expected = np.full(stride + width + 1, SENTINEL, np.uint32)
    counts = runs.pack_ternary_runs(
        as_tensor(stored, dtype), table, out, stride=stride, threshold=threshold, implementation=implementation
    )
    # What belongs to no run is left as it was.
    assert counts == reference.pack_ternary_runs(values(stored, dtype), table, expected, stride, threshold)
    assert np.array_equal(out.numpy().view(np.uint32), expected)


@given(layouts, st.integers(1, 20), st.integers(1, 6), st.integers(0, 5), implementations)
def test_vote_ternary_runs(
    layout: tuple[int, list[int]], num_rows: int, quorum: int, gap: int, implementation: str
) -> None:
    rng = np.random.default_rng(layout[0])
    table, _, width = bucket_layout(rng, layout[1])
    stride = width + gap
    # Rows as they arrive: with something behind the words, as a trailer.
    received = torch.from_numpy(rng.integers(-(2**31), 2**31, (num_rows, 2 * stride + 3), dtype=np.int32))
    rows = received[:, : 2 * stride]
    expected = np.full(2 * stride, SENTINEL, np.uint32)
    zeros = reference.vote_ternary_runs(list(rows.numpy().view(np.uint32)), table, expected, stride, quorum)
    chosen: dict[str, Any] = {"stride": stride, "quorum": quorum, "implementation": implementation}
    for given_rows in (rows, list(rows)):
        out = torch.full((2 * stride,), SENTINEL, dtype=torch.int32)
        assert runs.vote_ternary_runs(given_rows, table, out, **chosen) == zeros
        assert np.array_equal(out.numpy().view(np.uint32), expected)
    # The same from a tally of the messages, one after another.
    tally: VoteTally[torch.Tensor] = VoteTally(32 * stride, num_rows, ternary=True)
    for row in rows:
        tally.add(row.view(2, stride), implementation=implementation)
    if stride > 0:
        out = torch.full((2 * stride,), SENTINEL, dtype=torch.int32)
        assert tally.decide_ternary_runs(table, out, **chosen) == zeros
        assert np.array_equal(out.numpy().view(np.uint32), expected)


@given(layouts, dtypes, st.sampled_from([1.0, -2.0, 0.0, 0.5]), st.integers(0, 5), implementations)
def test_unpack_ternary_runs(
    layout: tuple[int, list[int]], dtype: str, scale: float, gap: int, implementation: str
) -> None:
    rng = np.random.default_rng(layout[0])
    table, numel, width = bucket_layout(rng, layout[1])
    stride = width + gap
    words = rng.integers(0, 2**32, stride + width, dtype=np.uint32)
    bucket = torch.full((numel,), 7.0, dtype=TORCH_DTYPES_BY_NAME[dtype])
    expected = np.full(numel, 7.0)
    reference.unpack_ternary_runs(words, table, stride, expected, np.float64(scale))
    runs.unpack_ternary_runs(as_words(words), table, stride, bucket, scale=scale, implementation=implementation)
    assert np.array_equal(bucket.double().numpy(), expected)


@given(st.integers(0, 1000), st.lists(st.integers(0, 15), max_size=5), implementations)
def test_pieces_equal_the_whole(numel: int, blocks: list[int], implementation: str) -> None:
    cuts = sorted({0, numel, *(64 * block for block in blocks if 64 * block < numel)})
    pieces = np.array([(5, a, b - a, a, a // 32) for a, b in pairwise(cuts)], np.int64).reshape(-1, 5)
    x = torch.from_numpy(mixture(np.random.default_rng(numel), numel, "float32"))
    width = signvote.num_words(numel)
    chosen: dict[str, Any] = {"implementation": implementation}
    whole = signvote.pack_ternary(x, threshold=0.5)
    out = torch.empty(2 * width, dtype=torch.int32)
    runs.pack_ternary_runs(x, pieces, out, stride=width, threshold=0.5, **chosen)
    assert torch.equal(out.view(2, width), whole)
    stack = torch.stack([whole, whole.roll(1, 1), ~whole])
    voted = signvote.majority_vote_ternary(stack, numel=numel)
    runs.vote_ternary_runs(stack.view(3, 2 * width), pieces, out, stride=width, **chosen)
    assert torch.equal(out.view(2, width), voted)
    y = torch.empty(numel)
    runs.unpack_ternary_runs(out, pieces, width, y, scale=0.5, **chosen)
    assert torch.equal(y, signvote.unpack_ternary(voted, numel, scale=0.5))


def test_no_runs() -> None:
    table = np.empty((0, 5), np.int64)
    out = torch.full((2,), SENTINEL, dtype=torch.int32)
    assert runs.pack_ternary_runs(torch.ones(3), table, out, stride=1) == (0, 0)
    assert runs.vote_ternary_runs(torch.zeros(2, 2, dtype=torch.int32), table, out, stride=1) == 0
    bucket = torch.full((3,), 7.0)
    runs.unpack_ternary_runs(out, table, 1, bucket)
    assert bucket.tolist() == [7, 7, 7]
    assert out.tolist() == [SENTINEL] * 2


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 8, 16, 17, 64, 255, 256])
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 64, 65, 257, 513, 1000])
def test_a_tally_equals_the_vote_on_all_words_at_once(numel: int, num_rows: int, implementation: str) -> None:
    rng = np.random.default_rng(num_rows)
    rows = ternary_rows(rng, num_rows, numel)
    tally: NumpyTally = VoteTally(numel, num_rows, ternary=True)
    for row in rows:
        tally.add(row, implementation=implementation)
    lead = np.array([reference.ternary_of(row, numel) for row in rows]).sum(axis=0)
    assert tally.counts().dtype == np.int32
    assert np.array_equal(tally.counts(), lead)
    for quorum in (1, 2, num_rows, num_rows + 1):
        expected = signvote.majority_vote_ternary(rows, quorum=quorum, numel=numel)
        assert np.array_equal(tally.decide(quorum=quorum, implementation=implementation), expected)
    # Without a quorum a lead of 0 is a tie.
    for ties in ("coin", "positive", "negative"):
        bits = np.where(lead == 0, reference.decided(ties, 9, numel), lead > 0)
        found = tally.decide(ties=ties, seed=9, implementation=implementation)
        assert np.array_equal(found, reference.words_of(bits))


@given(
    numel=st.integers(0, 700),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=8),
    quorum=st.integers(1, 1000),
    parts=st.integers(1, 3),
    seed=seeds,
    implementation=implementations,
)
def test_weights_merging_and_order(
    numel: int, weights: list[int], quorum: int, parts: int, seed: int, implementation: str
) -> None:
    rng = np.random.default_rng(seed)
    votes = random_votes(rng, numel, len(weights))
    rows, most = planes_of(votes), sum(weights)
    lead = np.array(weights) @ votes
    for order in (list(range(len(votes))), rng.permutation(len(votes)).tolist()):
        tallies: list[NumpyTally] = [VoteTally(numel, most, ternary=True) for _ in range(parts)]
        for place, i in enumerate(order):
            tallies[place % parts].add(rows[i], weights[i], implementation=implementation)
        whole: NumpyTally = VoteTally(numel, most, ternary=True)
        for tally in tallies if order[0] % 2 else tallies[::-1]:
            whole.merge(tally, implementation=implementation)
        assert whole.num_votes == most
        assert np.array_equal(whole.counts(), lead)
        result = whole.decide(quorum=quorum, implementation=implementation)
        assert np.array_equal(result, reference.planes_of(np.where(abs(lead) < quorum, 0, lead)))


@pytest.mark.parametrize("max_votes", [1, 2, 3, 4, 127, 128, 2**30, 2**31 - 1])
def test_a_tally_is_exact_up_to_the_maximum(max_votes: int) -> None:
    plus, none = np.full((2, 3), 2**32 - 1, np.uint32), np.zeros((2, 3), np.uint32)
    minus = np.array([[0] * 3, [2**32 - 1] * 3], np.uint32)
    for votes, lead in ((plus, max_votes), (none, 0), (minus, -max_votes)):
        tally: NumpyTally = VoteTally(96, max_votes, ternary=True)
        tally.add(votes, max_votes)
        assert tally.counts().tolist() == [lead] * 96
        for quorum in (1, max_votes):
            assert np.array_equal(tally.decide(quorum=quorum), votes)
        for quorum in (max_votes + 1, 2**63 - 1):
            assert np.array_equal(tally.decide(quorum=quorum), none)
        assert tally.decide(ties="positive").tolist() == [2**32 - 1 if lead >= 0 else 0] * 3
        with pytest.raises(ValueError, match="expected at most 0 more"):
            tally.add(none)
        assert tally.counts().tolist() == [lead] * 96


def test_a_tally_takes_planes_that_lie_apart() -> None:
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 2**32, (3, 9), np.uint32)
    tally: NumpyTally = VoteTally(128, 1, ternary=True)
    tally.add(wide[::2, 3:7])
    assert np.array_equal(tally.counts(), reference.ternary_of(wide[::2, 3:7], 128))


@pytest.mark.parametrize("ternary", [False, True])
def test_clear(ternary: bool) -> None:
    votes = np.full((2, 10) if ternary else 10, 5, np.uint32)
    tally: NumpyTally = VoteTally(320, 100, ternary=ternary)
    for weight in (100, 3, 64):
        tally.add(votes, weight)
        assert tally.counts().sum() == weight * 20
        tally.clear()
        assert tally.num_votes == 0
        assert not tally._planes.any()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells the resident memory there")
@pytest.mark.parametrize("ternary", [False, True])
def test_memory_is_taken_up_when_it_is_needed(ternary: bool) -> None:
    width = 2**20
    votes = np.full((2, width) if ternary else width, 5, np.uint32)
    before = resident_bytes()
    tally: NumpyTally = VoteTally(32 * width, 2**31 - 1, ternary=ternary)
    for _ in range(2):
        tally.clear()
        tally.add(votes)
    assert tally._planes.nbytes >= 31 * 4 * width
    assert resident_bytes() - before < 6 * 4 * width
