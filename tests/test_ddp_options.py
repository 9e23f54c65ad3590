"""The hook's options with each other, with DDP's features, and between ranks of unequal weight.

One run on real ranks trains many small jobs: to start one costs more than to train.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from ddp_jobs import Job, Outcome, batches, build, digest, in_memory_order, mlp, step, train
from ddp_simulation import Simulation
from ranks import RankPool
from signvote.ddp import MajorityVoteState, ParameterStats, attach, majority_vote_hook
from test_ddp_training import (
    FEATURES,
    OPTIONS,
    TINY_BUCKETS,
    check_against_simulation,
    in_bits,
    parameter_names,
    schedule,
)

EVERYTHING = OPTIONS["abstain_with_everything"]


def simulate(model: str, options: Mapping[str, Any], world: int = 3, **more: Any) -> Simulation:
    names = parameter_names(model)
    of_votes = {name: value for name, value in options.items() if name not in ("topology", "exclude")}
    patterns = options.get("exclude", [])
    exclude = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return Simulation(world, names, exclude=exclude, **of_votes, **more)


def check_step(simulation: Simulation, outcomes: list[Outcome], i: int) -> None:
    """The next step of ``simulation`` is step ``i`` of all ranks."""
    expected = simulation.vote([outcome.local[i] for outcome in outcomes])
    for rank, outcome in enumerate(outcomes):
        for name, voted in outcome.voted[i].items():
            assert in_bits(voted) == in_bits(expected[name]), (rank, i, name)


def train_all(jobs: Mapping[str, Job]) -> dict[str, Outcome]:
    return {name: train(job) for name, job in jobs.items()}


def check_all(ranks: RankPool, jobs: Mapping[str, Job], world: int = 3) -> dict[str, list[Outcome]]:
    """Every job equals the simulation; returns what came of it on each rank."""
    by_rank = ranks.run(train_all, jobs, world=world)
    outcomes = {name: [outcomes[name] for outcomes in by_rank] for name in jobs}
    for name, job in jobs.items():
        try:
            check_against_simulation(job, outcomes[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return outcomes


@pytest.mark.parametrize("topology", ["allgather", "server"])
def test_options_equal_simulation_with_every_topology(ranks: RankPool, topology: str) -> None:
    check_all(
        ranks,
        {
            name: Job("rows", steps=8, options={**options, "topology": topology}, ddp=TINY_BUCKETS)
            for name, options in OPTIONS.items()
        },
    )


# -- Weights ----------------------------------------------------------------------------------------------------------


WEIGHTED: dict[str, dict[str, Any]] = {
    name: OPTIONS[name]
    for name in (
        "signum",
        "constant_bits",
        "abstain",
        "threshold",
        "relative_threshold",
        "quorum",
        "zero_ties",
        "exclude",
        "exclude_all",
        "mean_abs",
        "dense_steps",
        "abstain_with_everything",
    )
}


@pytest.mark.parametrize("topology", ["sharded", "allgather", "server"])
def test_weights_equal_simulation(ranks: RankPool, topology: str) -> None:
    """Of weights 1, 3, 2 the second ties with the others; of the greatest the last is without a say."""
    jobs = {
        f"{name} {weights}": Job(
            "rows", steps=6, options={**options, "topology": topology}, ddp=TINY_BUCKETS, weights=weights
        )
        for name, options in WEIGHTED.items()
        for weights in ((1, 3, 2),)
    }
    jobs["greatest"] = Job("rows", steps=3, options={"topology": topology}, weights=(65535, 65535, 1))
    jobs["greatest, ternary"] = Job(
        "rows", steps=3, options={"topology": topology, "abstain": True, "quorum": 0.6}, weights=(65535, 65535, 65535)
    )
    check_all(ranks, jobs)


@pytest.mark.parametrize("topology", ["sharded", "server"])
def test_equal_weights_are_no_weights(ranks: RankPool, topology: str) -> None:
    jobs = {
        f"{name} {weight}": Job(
            "rows", steps=6, options={**WEIGHTED[name], "topology": topology}, weights=(weight,), record=False
        )
        for name in ("signum", "abstain", "zero_ties", "relative_threshold", "dense_steps", "exclude")
        for weight in (1, 4)  # a mean of four times the sum is rounded as that of the sum
    }
    for outcomes in ranks.run(train_all, jobs, world=3):
        digests = [outcome.digest for outcome in outcomes.values()]
        assert digests[::2] == digests[1::2]
        assert len(set(digests)) == len(digests) // 2


# -- Features of DDP --------------------------------------------------------------------------------------------------


def test_features_with_options_equal_simulation(ranks: RankPool) -> None:
    """The topologies take turns: with each option, all of them are compared above."""
    jobs = {
        f"{feature}, everything": replace(job, options=EVERYTHING, weights=(2, 1, 3))
        for feature, job in FEATURES.items()
        if feature not in ("one_element", "channels_last")
    }
    jobs |= {
        f"join, {name}": Job("rows", uneven=True, options=OPTIONS[name], ddp=TINY_BUCKETS)
        for name in ("abstain", "abstain_lion", "relative_threshold_with_dither", "zero_ties", "mean_abs", "exclude")
    }
    jobs |= {
        "no_sync, mean_abs": Job(accumulate=3, options={"scale": "mean_abs", "exclude": ["0.weight"]}),
        "mixed, dense": Job("mixed", options={"dense_steps": 4, "exclude": ["second.*"], "scale": "mean_abs"}),
        "mixed, dither": Job("mixed", options={"dither": 0.5, "ties": "zero"}, ddp=TINY_BUCKETS),
        "mixed, lion": Job("mixed", options=OPTIONS["abstain_lion"] | {"abstain": "rms:0.2"}),
        "channels_last, weight": Job("channels_last", options=EVERYTHING | {"exclude": ["conv.weight"]}),
        "channels_last, bias": Job("channels_last", options=EVERYTHING | {"exclude": ["conv.bias"]}),
        "channels_last, dense": Job("channels_last", options={"dense_steps": 3, "momentum": 0.5}),
        "unused, abstain": Job("branches", options={"abstain": True}, ddp={"find_unused_parameters": True}),
    }
    for name in ("exclude_all", "zero_ties", "mean_abs", "dither", "agreement", "dense_steps", "relative_threshold"):
        options = {**OPTIONS[name], **({"exclude": ["*"]} if "exclude" in OPTIONS[name] else {})}
        jobs |= {f"{model}, {name}": Job(model, options=options, ddp=TINY_BUCKETS) for model in ("scalar", "empty")}
    topologies = itertools.cycle(["sharded", "allgather", "server"])
    jobs = {name: replace(job, options={**job.options, "topology": next(topologies)}) for name, job in jobs.items()}
    jobs |= {
        f"empty and weights, {name}, {topology}": Job(
            "empty", options={**options, "topology": topology}, ddp=TINY_BUCKETS, weights=(1, 3, 2)
        )
        for name, options in (("plain", {}), ("abstain", {"abstain": True}), ("exclude", {"exclude": ["before"]}))
        for topology in ("sharded", "server")
    }
    check_all(ranks, {name: replace(job, steps=8) for name, job in jobs.items()})


class OwnRows(nn.Module):
    """Each rank looks up a row of its own; `never` is used by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head, self.never = nn.Embedding(6, 4), nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rows(torch.full(x.shape[:1], dist.get_rank())))


def train_own_rows(options: dict[str, Any], ends: tuple[int, ...]) -> tuple[list[dict[str, torch.Tensor]], int]:
    """The parameters before each step and after the last, on this rank; it ends after as many steps as it has."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    ddp = DistributedDataParallel(OwnRows(), find_unused_parameters=True)
    attach(ddp, **options)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    seen = []
    with Join([ddp]):
        for x in batches(ends[rank], rank):
            seen.append({name: p.detach().clone() for name, p in ddp.module.named_parameters()})
            step(ddp, optimizer, Job(), x)
            for p in ddp.parameters():
                assert p.grad is None or not torch.signbit(p.grad[p.grad == 0]).any()
    seen.append({name: p.detach().clone() for name, p in ddp.module.named_parameters()})
    return seen, rank


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": (0.9, 0.99)},
        {"momentum": 0.0},
        {"abstain": "rms:0.001"},
        {"dither": 0.5},
        {"scale": "mean_abs", "warmup_steps": 3},
        {"topology": "server"},
    ],
    ids=str,
)
def test_what_nobody_has_seen_does_not_move(ranks: RankPool, options: dict[str, Any]) -> None:
    """Rows of ranks that have joined, rows that nobody looks up, and unused parameters; whatever momentum they have."""
    ends = (9, 6, 3)
    (seen, _), *_ = ranks.run(train_own_rows, {"abstain": True, **options}, ends, world=3)
    assert len(seen) == 10
    for i, (before, after) in enumerate(itertools.pairwise(seen)):
        moved = (before["rows.weight"] != after["rows.weight"]).any(1).tolist()
        assert moved == [i < ends[row] if row < 3 else False for row in range(6)]
        assert not torch.equal(before["head.weight"], after["head.weight"])
        assert torch.equal(before["never.weight"], after["never.weight"])
        assert torch.equal(before["never.bias"], after["never.bias"])


# -- Weights, set anew ------------------------------------------------------------------------------------------------


def weight_at(i: int, rank: int) -> int:
    return 1 + (3 * i + 2 * rank) % 5


def train_with_changing_weights(options: dict[str, Any]) -> Outcome:
    job = Job("rows", steps=6, options=options, ddp=TINY_BUCKETS)
    ddp, state, outcome = build(job)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    for i, x in enumerate(batches(job.steps, dist.get_rank())):
        state.weight = weight_at(i, dist.get_rank())
        wrong: list[Any] = [0, -1, 2**16, 1.5, "2", True, None]
        for bad in wrong:
            with pytest.raises(ValueError, match="weight: expected an integer from 1 to 65535"):
                state.weight = bad
        step(ddp, optimizer, job, x)
        outcome.voted.append({name: in_memory_order(p.grad) for name, p in ddp.module.named_parameters()})
    outcome.digest = digest(ddp.module)
    return outcome


@pytest.mark.parametrize("options", ["signum", "abstain_with_everything"])
def test_weights_that_change_equal_simulation(ranks: RankPool, options: str) -> None:
    outcomes = ranks.run(train_with_changing_weights, OPTIONS[options], world=3)
    simulation = simulate("rows", OPTIONS[options])
    for i in range(6):
        simulation.weights = [weight_at(i, rank) for rank in range(3)]
        check_step(simulation, outcomes, i)
    assert len({outcome.digest for outcome in outcomes}) == 1


# -- Statistics -------------------------------------------------------------------------------------------------------


def test_replicas_stay_identical_with_everything(ranks: RankPool) -> None:
    """Over 200 steps."""
    options = {**EVERYTHING, "dither": schedule, "dense_steps": 20, "warmup_steps": 54}
    jobs = {
        topology: Job("rows", 200, {**options, "topology": topology}, record=False, weights=(2, 3, 1))
        for topology in ("sharded", "server")
    }
    digests = {o.digest for by_topology in ranks.run(train_all, jobs, world=3) for o in by_topology.values()}
    assert len(digests) == 1


# -- Parameters of which the mean is taken ----------------------------------------------------------------------------


def exclude_without_names() -> None:
    ddp = DistributedDataParallel(mlp())
    ddp.register_comm_hook(MajorityVoteState(exclude="*.bias"), majority_vote_hook)
    with pytest.raises(RuntimeError, match=r"exclude needs the parameters' names: use attach\(ddp\)"):
        ddp(torch.ones(2, 7)).sum().backward()
    with pytest.raises(ValueError, match=r"exclude: '0\.bais': expected .*; close to it: '0\.bias'"):
        attach(DistributedDataParallel(mlp()), exclude="0.bais")


def test_exclude_needs_names_that_exist(ranks: RankPool) -> None:
    ranks.run(exclude_without_names, world=1)


def test_means_are_sums_in_float32_rounded_once(ranks: RankPool) -> None:
    job = Job("mixed", steps=4, options={"exclude": ["*"]})
    outcomes = ranks.run(train, job, world=3)
    for i in range(job.steps):
        for name, voted in outcomes[0].voted[i].items():
            own = [outcome.local[i][name] for outcome in outcomes]
            wide = torch.float64 if voted.dtype == torch.float64 else torch.float32
            total = own[0].to(wide) + own[1].to(wide) + own[2].to(wide)
            assert in_bits((total / 3).to(voted.dtype)) == in_bits(voted)


def nan_in_an_excluded_parameter(nonfinite: str) -> tuple[dict[str, bool], int]:
    """Which gradients are finite."""
    ddp = DistributedDataParallel(mlp())
    state = attach(ddp, exclude=["0.bias"], nonfinite=nonfinite)
    loss = ddp(torch.ones(2, 7)).sum()
    if dist.get_rank() == 1:
        loss = loss + torch.nan * ddp.module[0].bias[0]
    loss.backward()
    finite = {name: bool(p.grad.isfinite().all()) for name, p in ddp.module.named_parameters()}
    return finite, state.stats().nonfinite


def test_nonfinite_in_an_excluded_parameter(ranks: RankPool) -> None:
    names = parameter_names("mlp")
    for finite, nonfinite in ranks.run(nan_in_an_excluded_parameter, "propagate", world=3):
        assert (finite, nonfinite) == (dict.fromkeys(names, False), 1)
    for finite, nonfinite in ranks.run(nan_in_an_excluded_parameter, "ignore", world=3):
        assert (finite, nonfinite) == ({name: name != "0.bias" for name in names}, 1)
    for error in ranks.outcomes(nan_in_an_excluded_parameter, "raise", world=3):
        assert "1 gradient coordinates are NaN or inf, the lowest rank that has any is 1" in str(error)


# -- Noise ------------------------------------------------------------------------------------------------------------


def bad_schedule(step: int) -> Any:
    return [0.1, 0.0, -1.0][step - 1]


def nothing_of_a_number(step: int) -> Any:
    return None


def train_with_bad_schedules() -> None:
    for schedule_, step_, got in ((bad_schedule, 3, "-1.0"), (nothing_of_a_number, 1, "None")):
        ddp, _, _ = build(Job(options={"dither": schedule_}, record=False))
        for _ in range(step_ - 1):
            ddp(torch.ones(2, 7)).sum().backward()
        with pytest.raises(ValueError, match=rf"dither\({step_}\): expected a finite number from 0 on, .* got {got}"):
            ddp(torch.ones(2, 7)).sum().backward()


def test_a_schedule_that_returns_nonsense_is_named_with_its_step(ranks: RankPool) -> None:
    ranks.run(train_with_bad_schedules, world=2)


def margins_of_equal_gradients() -> dict[str, ParameterStats]:
    """All ranks have the same gradient, which is small against the noise."""
    ddp = DistributedDataParallel(nn.Linear(50, 40, bias=False))
    state = attach(ddp, dither=100.0, track_agreement=True, momentum=0.0, ties="zero")
    for _ in range(2):
        ddp(torch.linspace(-1, 1, 50)[None]).sum().backward()
    return state.stats(per_parameter=True)


def test_each_rank_draws_its_own_noise(ranks: RankPool) -> None:
    for rates in ranks.run(margins_of_equal_gradients, world=4):
        assert rates["weight"].margin == pytest.approx(3 / 8, abs=0.03)  # of four coins: (2·4 + 8·2) / 16 / 4
