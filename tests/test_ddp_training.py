"""The hook on real gloo ranks equals the single-process simulation, bit for bit and from the first step on."""

import math
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given

import signvote
from ddp_jobs import MODELS, Job, Outcome, train
from ddp_simulation import Simulation
from ranks import RankPool
from signvote.ddp import MajorityVoteState
from signvote.ddp.layout import FIRST, NUMEL, PLACE, WORD, BucketLayout, MessageLayout
from signvote.ddp.options import TOPOLOGIES
from signvote.ddp.topology import chosen

TINY_BUCKETS = {"bucket_cap_mb": 1e-5}  # one parameter each, once DDP has rebuilt its buckets

FEATURES = {
    "plain": Job(),
    "rebuilt_buckets": Job(ddp=TINY_BUCKETS),
    "gradient_as_bucket_view": Job(ddp={"gradient_as_bucket_view": True, **TINY_BUCKETS}),
    "static_graph": Job(ddp={"static_graph": True, **TINY_BUCKETS}),
    "find_unused_parameters": Job("branches", ddp={"find_unused_parameters": True, **TINY_BUCKETS}),
    "no_sync": Job(accumulate=3),
    "join": Job(uneven=True, ddp=TINY_BUCKETS),
    "mixed_dtypes": Job("mixed", ddp=TINY_BUCKETS),
    "frozen_parameters": Job("frozen", ddp=TINY_BUCKETS),
    "one_element": Job("scalar"),
    "untouched_rows": Job("rows"),
    "channels_last": Job("channels_last"),
    "forty_buckets_and_delays": Job("deep", ddp=TINY_BUCKETS, delays=True),
    "weights": Job("rows", weights=(3, 1)),
    "switch_to_dense": Job(switch=7),
}


def schedule(step: int) -> float:
    return 1.0 / step


OPTIONS: dict[str, dict[str, Any]] = {
    "signum": {},
    "signsgd": {"momentum": 0.0},
    "lion": {"momentum": (0.9, 0.99), "seed": 2**64 - 1},
    "constant_bits": {"momentum": 0.0, "zeros": "positive", "ties": "negative", "scale": 0.25},
    "constant_bits_reversed": {"zeros": "negative", "ties": "positive"},
}
ONE_BIT = list(OPTIONS)

OPTIONS |= {
    "warmup": {"warmup_steps": 5},
    "dense_steps": {"dense_steps": 3},
    "dense_steps_then_warmup": {"momentum": (0.9, 0.99), "dense_steps": 3, "warmup_steps": 6},
    "dense_steps_without_momentum": {"momentum": 0.0, "dense_steps": 3},
    "exclude": {"exclude": ["*.bias"]},
    "exclude_all": {"exclude": ["*"]},
    "exclude_in_dense_steps": {"exclude": ["rows.weight"], "dense_steps": 4},
    "mean_abs": {"scale": "mean_abs", "exclude": ["head.bias"]},
    "dither": {"dither": 0.5, "seed": 7},
    "dither_without_momentum": {"momentum": 0.0, "dither": schedule},
    "dithered_lion": {"momentum": (0.9, 0.99), "dither": 0.1, "warmup_steps": 4},
    "agreement": {"track_agreement": True, "scale": "mean_abs"},
}

TERNARY: dict[str, dict[str, Any]] = {
    "abstain": {"abstain": True},
    "abstain_without_momentum": {"momentum": 0.0, "abstain": True},
    "abstain_lion": {"momentum": (0.9, 0.99), "abstain": True, "warmup_steps": 4},
    "threshold": {"abstain": 1e-3, "quorum": 2},
    "threshold_without_momentum": {"momentum": 0.0, "abstain": 1e-3},
    "relative_threshold": {"abstain": "rms:0.3", "quorum": 0.5},
    "relative_threshold_with_dither": {"momentum": 0.0, "abstain": "rms:0.3", "dither": 0.4},
    "quorum": {"quorum": 2},
    "unanimity": {"momentum": 0.0, "quorum": 1.0},
    "zero_ties": {"ties": "zero", "scale": 0.5},
    "abstain_with_everything": {
        "abstain": 1e-4,
        "quorum": 0.3,
        "warmup_steps": 5,
        "dense_steps": 2,
        "exclude": ["*.bias"],
        "scale": "mean_abs",
        "dither": 0.1,
        "track_agreement": True,
    },
}
OPTIONS |= TERNARY


def parameter_names(model: str) -> list[str]:
    return [name for name, _ in MODELS[model]().named_parameters()]


def in_bits(x: torch.Tensor) -> tuple[torch.dtype, bytes]:
    """0.0 == -0.0, and NaN is not NaN."""
    return x.dtype, x.flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def check_against_simulation(job: Job, outcomes: list[Outcome]) -> None:
    names = parameter_names(job.model)
    options = {name: value for name, value in job.options.items() if name not in ("topology", "exclude")}
    patterns = job.options.get("exclude", [])
    options["exclude"] = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    simulation = Simulation(
        len(outcomes),
        names,
        weights=[job.weights[rank % len(job.weights)] for rank in range(len(outcomes))],
        devices=job.devices,
        switch=job.switch or math.inf,
        **options,
    )
    steps = len(outcomes[0].local)
    assert steps == job.steps
    for step in range(steps):
        expected = simulation.vote([outcome.local[step] for outcome in outcomes])
        for rank, outcome in enumerate(outcomes):
            if step >= len(outcome.voted):
                continue  # this rank has joined: it votes on, but takes no step
            for name, voted in outcome.voted[step].items():
                assert in_bits(voted) == in_bits(expected[name]), (rank, step, name)
    assert len({outcome.digest for outcome in outcomes}) == 1


@pytest.mark.parametrize("topology", ["sharded", "allgather", "server"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("world", [2, 3])
def test_equals_simulation(ranks: RankPool, feature: str, topology: str, world: int) -> None:
    job = FEATURES[feature]
    job = replace(job, options={"topology": topology})
    outcomes = ranks.run(train, job, world=world)
    check_against_simulation(job, outcomes)
    if feature in ("rebuilt_buckets", "forty_buckets_and_delays"):
        assert outcomes[0].buckets == set(range(len(parameter_names(job.model))))


def train_where_auto_mixes(job: Job) -> tuple[Outcome, list[set[str]]]:
    """Also returns the exchanges of each step: among 3 ranks, buckets of up to 24 coordinates gather."""
    exchanges: list[set[str]] = []

    def recording(state: MajorityVoteState, channel: Any, bucket: Any, phase: Any) -> Any:
        if bucket.index() == 0:
            exchanges.append(set())
        plan = right(state, channel, bucket, phase)
        exchanges[-1].add(type(plan.exchange).__name__)
        return plan

    right = MajorityVoteState.plan
    with (
        mock.patch("signvote.ddp.topology.MORE_BYTES", 2),
        mock.patch.object(MajorityVoteState, "plan", recording),
    ):
        return train(job), exchanges


@pytest.mark.parametrize("feature", [feature for feature, job in FEATURES.items() if job.ddp == TINY_BUCKETS])
def test_auto_equals_simulation(ranks: RankPool, feature: str) -> None:
    """Where a step gathers some of its buckets and shards others."""
    job = replace(FEATURES[feature], options={"topology": "auto"})
    outcomes = ranks.run(train_where_auto_mixes, job, world=3)
    check_against_simulation(job, [outcome for outcome, _ in outcomes])
    for _, exchanges in outcomes:
        assert exchanges[-1] == {"Sharded", "AllGather"}


@pytest.mark.parametrize(
    ("options", "world"),
    # the others vote in threes in test_ddp_options.py
    [(options, world) for options in OPTIONS for world in ((1, 2, 3, 4) if options in ONE_BIT else (1, 4))],
)
def test_options_equal_simulation(ranks: RankPool, options: str, world: int) -> None:
    job = Job("rows", options=OPTIONS[options], ddp=TINY_BUCKETS)
    check_against_simulation(job, ranks.run(train, job, world=world))


def train_in_pieces(job: Job) -> Outcome:
    with mock.patch("signvote.ddp.ballot.PIECE", 64):
        return train(job)


@pytest.mark.parametrize("options", ["mean_abs", "dither", "relative_threshold"])
def test_parameters_that_are_reduced_in_pieces_equal_simulation(ranks: RankPool, options: str) -> None:
    job = Job("rows", options=OPTIONS[options])
    check_against_simulation(job, ranks.run(train_in_pieces, job, world=2))


@pytest.mark.parametrize(
    # 16,000 delayed exchanges are enough among two
    ("feature", "world"),
    [(name, world) for name, job in FEATURES.items() for world in ((2,) if job.delays else (1, 3, 4))],
)
def test_replicas_stay_identical_with_each_feature(ranks: RankPool, feature: str, world: int) -> None:
    """Over 200 steps."""
    job = replace(FEATURES[feature], steps=200, record=False)
    outcomes = ranks.run(train, job, world=world, timeout=100)
    assert len({outcome.digest for outcome in outcomes}) == 1
    assert all(outcome.stats["steps"] >= 200 - rank * job.uneven for rank, outcome in enumerate(outcomes))


def calls_of_a_vote(topology: str) -> list[str]:
    """What is asked of gloo on one bucket, in order."""
    calls = []

    def recording(name: str) -> Callable[..., dist.Work]:
        call = getattr(dist.ProcessGroup, name)

        def recorded(*arguments: Any) -> dist.Work:
            calls.append(name)
            return call(*arguments)

        return recorded

    with mock.patch.multiple(dist.ProcessGroup, recv=recording("recv"), send=recording("send")):
        train(Job(steps=1, options={"topology": topology}))
    return calls


@pytest.mark.parametrize(("topology", "swaps"), [("sharded", 2), ("allgather", 1)])
def test_receives_are_posted_before_sends(ranks: RankPool, topology: str, swaps: int) -> None:
    """gloo asks for a message behind what it sends on the same connection: the directions would take turns."""
    world = 3
    for calls in ranks.run(calls_of_a_vote, topology, world=world):
        assert calls == ([*["recv"] * (world - 1), *["send"] * (world - 1)] * swaps)


@pytest.mark.parametrize("size", [3, 4, 8, 64, 1024])
def test_auto_gathers_where_that_sends_little_more(size: int) -> None:
    more = (size - 1) / 8 - 2 * (size - 1) / size / 8  # bytes per coordinate
    largest = round(16 * 1024 / more)
    assert [chosen("auto", numel, size) for numel in (1, largest - 1, largest + 1, 10**9)] == (
        ["allgather"] * 2 + ["sharded"] * 2
    )


def test_auto_gathers_between_two() -> None:
    assert chosen("auto", 10**9, 2) == chosen("auto", 1, 2) == chosen("auto", 1, 1) == "allgather"


@pytest.mark.parametrize("topology", ["sharded", "allgather", "server"])
def test_a_topology_that_was_named_is_taken(topology: str) -> None:
    assert chosen(topology, 1, 2) == chosen(topology, 10**9, 8) == topology


def train_on_another_cpu() -> str:
    """Each rank has other kernels, as on CPUs of different kinds."""
    names = signvote.implementations()
    rank = dist.get_rank()
    return train(Job("rows", steps=50, options={"implementation": names[rank % len(names)]}, record=False)).digest


def test_cpus_of_different_kinds_give_the_same_bits(ranks: RankPool) -> None:
    assert len(set(ranks.run(train_on_another_cpu, world=3))) == 1


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_replicas_stay_identical(ranks: RankPool, world: int) -> None:
    """Over 300 steps, and all topologies train to the same bits."""
    digests = set()
    for topology in TOPOLOGIES:
        job = Job("rows", steps=300, options={"topology": topology}, ddp=TINY_BUCKETS, record=False)
        for outcome in ranks.run(train, job, world=world):
            digests.add(outcome.digest)
            assert len(outcome.buckets) == len(parameter_names("rows"))
    assert len(digests) == 1


def train_beside_other_groups() -> str:
    """Rank 0 is in groups that the others are not in."""
    for _ in range(2):
        dist.new_group([0])
    return train(Job(steps=3, record=False)).digest


def test_ranks_may_be_in_other_groups(ranks: RankPool) -> None:
    assert len(set(ranks.run(train_beside_other_groups, world=3))) == 1


def bind_uneven_subgroup() -> str:
    group = dist.new_group([0, 1])
    dist.new_group([0])
    if dist.get_rank() == 2:
        return ""
    with pytest.raises(RuntimeError) as info:
        MajorityVoteState(group).channel()
    return str(info.value)


def test_a_subgroup_that_torch_cannot_double_is_refused_at_once(ranks: RankPool) -> None:
    for rank, text in enumerate(ranks.run(bind_uneven_subgroup, world=3)[:2]):
        assert f"signvote: rank {rank}: new group: ranks [0, 1] belong to [3, 2] process groups" in text


def train_subgroup(topology: str) -> str | None:
    """Ranks 1 and 2 train, 0 does not."""
    from torch.nn.parallel import DistributedDataParallel

    from ddp_jobs import batches, digest, mlp, step
    from signvote.ddp import attach

    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    torch.manual_seed(0)
    ddp = DistributedDataParallel(mlp(), process_group=group)
    state = attach(ddp, topology=topology)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    for x in batches(5, dist.get_rank()):
        step(ddp, optimizer, Job(), x)
    assert state.stats().steps == 5
    return digest(ddp.module)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_ranks_of_a_subgroup_vote_among_themselves(ranks: RankPool, topology: str) -> None:
    outcomes = ranks.run(train_subgroup, topology, world=3)
    assert outcomes[0] is None
    assert outcomes[1] == outcomes[2] is not None


@given(
    numels=st.lists(st.integers(0, 300), max_size=12),
    num_shards=st.integers(1, 9),
)
def test_layout_covers_each_coordinate_once(numels: list[int], num_shards: int) -> None:
    places = [7 * i for i in range(len(numels))]
    layout = MessageLayout(BucketLayout(numels, places, num_shards))
    expected = 0  # runs are in the order of the buffer, without gaps
    used: set[int] = set()
    for run in layout.runs:
        assert run[NUMEL] > 0
        assert run[FIRST] % 64 == 0
        start = sum(numels[: places.index(run[PLACE])])
        assert run[3] == expected == start + run[FIRST]
        expected += run[NUMEL]
        row, column = divmod(int(run[WORD]), layout.row_words)
        words = -(-int(run[NUMEL]) // 32)
        assert row < num_shards
        assert column + words <= layout.stride  # never into a trailer
        touched = set(range(run[WORD], run[WORD] + words))
        assert not touched & used
        used |= touched
    assert expected == sum(numels)
    shards = [layout.shard_runs(shard) for shard in range(num_shards)]
    assert sum(map(len, shards)) == len(layout.runs)
    # padding: at most one block per parameter, one per shard, and the trailers
    assert layout.stride * num_shards <= sum(numels) / 32 + 2 * len(numels) + 2 * num_shards
