"""The hook's options with each other, with DDP's features, between ranks of unequal weight, and through a checkpoint.

One run on real ranks trains many small jobs: to start one costs more than to train.
"""

import copy
import itertools
import logging
import logging.handlers
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from signvote.ddp import CalibratedSwitch, MajorityVoteState, ParameterStats, attach, majority_vote_hook
from signvote.ddp.layout import TRAILER_WORDS
from signvote.optim import SignSGD
from test_ddp_state import resume, through_a_file
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


def is_bias(name: str, parameter: torch.Tensor) -> bool:
    return name.endswith("bias")


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


# -- Checkpoints ------------------------------------------------------------------------------------------------------

# Training stops after step 9.
RESUMED: dict[str, dict[str, Any]] = {
    "warmup": {"warmup_steps": 12},
    "warmup of lion": {"momentum": (0.5, 0.99), "warmup_steps": 12},
    "dense steps": {"dense_steps": 12, "warmup_steps": 15},
    "dither": {"dither": schedule, "seed": 5},
    "exclude": {"exclude": ["*.bias"]},
    "exclude by function": {"exclude": is_bias},
    "abstain": {"abstain": "rms:0.2", "quorum": 2},
    "ties": {"ties": "zero", "topology": "server"},
    "everything": {**EVERYTHING, "dense_steps": 8, "warmup_steps": 12},
    "momentum of nothing": {"exclude": ["*"]},
}


def resume_all(jobs: dict[str, Job]) -> dict[str, tuple[str, str, str]]:
    return {name: (*resume(job), pickle_and_go_on(job)) for name, job in jobs.items()}


def pickle_and_go_on(job: Job) -> str:
    """Digest after 20 steps, with a stop in the middle in which the state is pickled, twice."""
    ddp, state, _ = build(job)
    optimizer = SignSGD(ddp.parameters(), lr=0.01)
    for x in batches(9, dist.get_rank()):
        step(ddp, optimizer, job, x)
    model, weight = copy.deepcopy(ddp.module.state_dict()), state.weight
    state = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(state))))
    assert state.weight == weight
    ddp, state, _ = build(job, state)
    ddp.module.load_state_dict(model)
    optimizer = SignSGD(ddp.parameters(), lr=0.01)
    for x in batches(11, dist.get_rank(), first=9):
        step(ddp, optimizer, job, x)
    return digest(ddp.module)


def test_each_option_is_resumed_bit_for_bit(ranks: RankPool) -> None:
    jobs = {
        name: Job("rows", options=options, ddp=TINY_BUCKETS, record=False, weights=(3, 1))
        for name, options in RESUMED.items()
    }
    by_rank = ranks.run(resume_all, jobs, world=2)
    for name in jobs:
        assert len({text for digests in by_rank for text in digests[name]}) == 1, name
    assert len({digests["dither"] for digests in by_rank} | {digests["abstain"] for digests in by_rank}) == 2


def load_own_checkpoint(exclude: list[str], at_step: int | None) -> None:
    """A state whose parameters have no momentum so far, though it is one with momentum."""
    job = Job("frozen", options={"exclude": exclude}, record=False)
    ddp, state, _ = build(job)
    if at_step is not None:
        state.switch_to_dense(at_step)
    step(ddp, SignSGD(ddp.parameters(), lr=0.01), job, torch.ones(2, 7))
    state.load_state_dict(state.state_dict())
    assert state.step == 1


@pytest.mark.parametrize(("exclude", "at_step"), [(["body.bias", "head.*"], None), ([], 1)])
def test_a_state_without_momentum_so_far_loads_its_own_checkpoint(
    ranks: RankPool, exclude: list[str], at_step: int | None
) -> None:
    ranks.run(load_own_checkpoint, exclude, at_step, world=1)


# -- GradScaler -------------------------------------------------------------------------------------------------------

SCALED: dict[str, dict[str, Any]] = {
    "signum": {},
    "lion": {"momentum": (0.9, 0.99), "warmup_steps": 3},
    "signsgd": {"momentum": 0.0},
    "threshold": {"abstain": 1e-3, "quorum": 2},
    "threshold without momentum": {"abstain": 1e-3, "momentum": 0.0},
    "relative threshold, noise": {"abstain": "rms:0.3", "dither": 0.2, "momentum": 0.0},
    "exclude": {"exclude": ["*.bias"], "topology": "server"},
    "dense steps": {"dense_steps": 3},
}
# One that grows, one that is halved, some whose reciprocal is no float.
LOSS_SCALES = (1024.0, 2048.0, 512.0, 3.0, 1000.0, 1.0)
POWERS = (1024.0, 2048.0, 512.0, 65536.0, 1.0, 0.25)


def train_scaled(options: dict[str, Any], scales: tuple[float, ...]) -> tuple[Outcome, str]:
    """With a GradScaler of these loss scales, and the digest of the parameters after as many steps without one."""
    outcomes: list[Outcome] = []
    for has_scaler in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=scales[0], enabled=has_scaler)
        job = Job("rows", options={**options, "scale": scaler} if has_scaler else options, ddp=TINY_BUCKETS)
        ddp, state, outcome = build(job)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
        for i, x in enumerate(batches(len(scales), dist.get_rank())):
            optimizer.zero_grad()
            scaler.scale((ddp(x).float() - 0.5).square().mean()).backward()
            outcome.voted.append({name: in_memory_order(p.grad) for name, p in ddp.module.named_parameters()})
            scaler.unscale_(optimizer)
            if state.phase.value in ("vote", "warm-up"):
                for name, p in ddp.module.named_parameters():
                    if not (name.endswith("bias") and "exclude" in options):
                        found = p.grad.abs()
                        torch.testing.assert_close(found[found > 0], torch.ones_like(found[found > 0]))
            scaler.step(optimizer)
            if has_scaler:
                scaler.update(scales[min(i + 1, len(scales) - 1)])
        outcome.digest = digest(ddp.module)
        outcomes.append(outcome)
    return outcomes[0], outcomes[1].digest


@pytest.mark.parametrize("options", SCALED)
def test_gradscaler(ranks: RankPool, options: str) -> None:
    outcomes = [outcome for outcome, _ in ranks.run(train_scaled, SCALED[options], LOSS_SCALES, world=3)]
    simulation = simulate("rows", SCALED[options], loss_scale=lambda step: LOSS_SCALES[step - 1])
    for i in range(len(LOSS_SCALES)):
        check_step(simulation, outcomes, i)
    # Momentum and thresholds are of the gradients without a loss scale, to the last bit where it is a power of two.
    digests = {
        text
        for scaled, plain in ranks.run(train_scaled, SCALED[options], POWERS, world=3)
        for text in (scaled.digest, plain)
    }
    assert len(digests) == 1


def overflow(bad_step: int) -> tuple[list[bool], list[float], str, bool]:
    """Rank 1 meets an infinite gradient: all skip that step, in which the next scale is found."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    job = Job(options={"scale": scaler, "abstain": True, "exclude": ["*.bias"]}, record=False, ddp=TINY_BUCKETS)
    ddp, state, _ = build(job)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    moved, scales = [], []
    for i, x in enumerate(batches(7, dist.get_rank())):
        before = digest(ddp.module)
        optimizer.zero_grad()
        loss = ddp(x).square().mean()
        if i == bad_step and dist.get_rank() == 1:
            loss = loss + torch.inf * ddp.module[2].weight[0, 0]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(digest(ddp.module) != before)
        scales.append(scaler.get_scale())
    is_finite = all(bool(m.isfinite().all()) for m in state.state_dict()["momentum"].values())
    return moved, scales, digest(ddp.module), is_finite


def test_gradscaler_skips_on_all_ranks(ranks: RankPool) -> None:
    outcomes = ranks.run(overflow, 3, world=3)
    assert all(outcome == outcomes[0] for outcome in outcomes)
    moved, scales, _, is_finite = outcomes[0]
    assert moved == [True, True, True, False, True, True, True]
    assert scales == [4.0, 8.0, 8.0, 4.0, 4.0, 8.0, 8.0]
    assert is_finite


def unpickle_without_scaler() -> None:
    job = Job(options={"scale": torch.amp.GradScaler("cpu", init_scale=8.0)}, record=False)
    _, state, _ = build(job)
    for again in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        ddp, _, _ = build(job, again)
        with pytest.raises(RuntimeError, match=r"pickled with a GradScaler: set state\.grad_scaler before use"):
            ddp(torch.ones(2, 7)).sum().backward()
    again = pickle.loads(pickle.dumps(state))
    again.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    ddp, _, _ = build(job, again)
    ddp(torch.ones(2, 7)).sum().backward()
    assert all(p.grad is not None and (p.grad.abs() == 1).all() for p in ddp.parameters())  # it has scaled nothing yet
    ddp.zero_grad()
    again.grad_scaler.scale(ddp(torch.ones(2, 7)).sum()).backward()
    assert all(p.grad is not None and (p.grad.abs() == 2).all() for p in ddp.parameters())


def test_a_gradscaler_is_not_pickled(ranks: RankPool) -> None:
    ranks.run(unpickle_without_scaler, world=1)


# -- Switch -----------------------------------------------------------------------------------------------------------


def train_and_switch(options: dict[str, Any], called_at: int, at_step: int) -> Outcome:
    job = Job("rows", steps=8, options=options, ddp=TINY_BUCKETS)
    ddp, state, outcome = build(job)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    for i, x in enumerate(batches(job.steps, dist.get_rank())):
        if i == called_at:
            assert state.switched_at is None
            state.switch_to_dense(at_step)
            assert state.switched_at == at_step
        step(ddp, optimizer, job, x)
        outcome.voted.append({name: in_memory_order(p.grad) for name, p in ddp.module.named_parameters()})
    outcome.digest = digest(ddp.module)
    return outcome


@pytest.mark.parametrize(
    ("options", "called_at", "at_step"),
    [
        ({}, 0, 5),
        ({}, 3, 4),
        ({"topology": "server"}, 0, 1),
        ({"topology": "allgather", "exclude": ["*.bias"], "scale": "mean_abs"}, 3, 6),
        ({"dense_steps": 6}, 1, 4),
        ({"dense_steps": 2, "warmup_steps": 6}, 1, 5),
        (EVERYTHING, 4, 6),
    ],
)
def test_switch_at_a_step_equals_simulation(
    ranks: RankPool, options: dict[str, Any], called_at: int, at_step: int
) -> None:
    outcomes = ranks.run(train_and_switch, options, called_at, at_step, world=3)
    simulation = simulate("rows", options, switch=at_step)
    for i in range(8):
        check_step(simulation, outcomes, i)
    assert len({outcome.digest for outcome in outcomes}) == 1


@dataclass
class Switched:
    outcome: Outcome
    at: int | None
    lr: float | None
    log: list[str]
    digest: str
    skipped: int


def lr_at(i: int) -> float:
    return 0.01 / (1 + 0.1 * i)


def new_rule() -> CalibratedSwitch:
    return CalibratedSwitch(beta=0.75, tolerance=0.1)


def train_by_rule(options: dict[str, Any], weights: tuple[int, ...], bad_step: int, stop: int | None) -> Switched:
    """Rank 1 has NaN in ``bad_step``, counted from 0. At ``stop``, training goes on from a checkpoint."""
    handler = logging.handlers.BufferingHandler(100)
    logger = logging.getLogger("signvote")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    job = Job("rows", options=options, ddp=TINY_BUCKETS, weights=weights)
    ddp, state, outcome = build(job)
    now = 0

    def lr() -> float:
        return lr_at(now)

    rule = new_rule()
    state.switch_to_dense(rule=rule, lr=lr)
    for now, x in enumerate(batches(24, dist.get_rank())):
        if now == stop:
            saved = through_a_file({"model": ddp.module.state_dict(), "vote": state.state_dict()})
            ddp, state, rest = build(job)
            rest.local, rest.voted = outcome.local, outcome.voted
            ddp.module.load_state_dict(saved["model"])
            with pytest.raises(ValueError, match="switch: expected a rule if and only if there was one"):
                state.load_state_dict(saved["vote"])
            assert state.step == 0
            rule = new_rule()
            state.switch_to_dense(rule=rule, lr=lr)
            state.load_state_dict(saved["vote"])
        ddp.zero_grad()
        loss = (ddp(x) - 0.5).square().mean()
        if now == bad_step and dist.get_rank() == 1:
            loss = loss * torch.nan
        loss.backward()
        outcome.voted.append({name: in_memory_order(p.grad) for name, p in ddp.module.named_parameters()})
        if now != bad_step:
            rate = lr_at(now) if state.switched_at is None else state.calibrated_lr or 0.0
            torch.optim.SGD(ddp.parameters(), lr=rate).step()
    logger.removeHandler(handler)
    log = [record.getMessage() for record in handler.buffer]
    return Switched(outcome, state.switched_at, state.calibrated_lr, log, digest(ddp.module), rule.skipped)


def rule_by_hand(switched: list[Switched], weights: tuple[int, ...], excluded: str) -> tuple[int, float]:
    """When the rule holds, and the learning rate: of the step after the next."""
    total, k = 0.0, 0
    for i in range(24):
        dot, numel = 0.0, 0
        for name, voted in switched[0].outcome.voted[i].items():
            if name != excluded:
                mean = sum(w * s.outcome.local[i][name].double() for w, s in zip(weights, switched, strict=True))
                dot += float((voted.sign() * mean).sum()) / sum(weights)
                numel += int((voted != 0).sum())
        gamma = lr_at(i) * numel / dot
        if not 0 < gamma < math.inf:
            continue
        k += 1
        total = 0.75 * total + 0.25 * gamma
        average = total / (1 - 0.75**k)
        if k >= 4 and abs(average - gamma) < 0.1 * average:
            return i + 1 + 2, average
    raise AssertionError("never")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.0, "topology": "allgather", "exclude": ["head.bias"]},
        {"abstain": True, "topology": "server"},
        {"scale": "mean_abs", "ties": "zero", "warmup_steps": 3},
    ],
    ids=str,
)
def test_switch_by_rule(ranks: RankPool, options: dict[str, Any]) -> None:
    weights = (1, 3, 2)
    straight = ranks.run(train_by_rule, options, weights, 2, None, world=3)
    at, rate = rule_by_hand(straight, weights, "head.bias" if "exclude" in options else "")
    for rank in straight:
        assert (rank.at, rank.skipped, rank.digest) == (at, 1, straight[0].digest)
        assert rank.lr == straight[0].lr == pytest.approx(rate, rel=1e-5)
        assert rank.log == [f"from step {at} on the mean, for SGD with a learning rate of {rank.lr:g}"]
    for i in range(at - 1, 24):
        for name, gradient in straight[0].outcome.voted[i].items():
            own = [weight * rank.outcome.local[i][name] for weight, rank in zip(weights, straight, strict=True)]
            torch.testing.assert_close(gradient, sum(own) / 6)
    for stop in (5, at - 1) if not options else (at - 2,):
        resumed = ranks.run(train_by_rule, options, weights, 2, stop, world=3)
        assert [(rank.at, rank.lr, rank.digest) for rank in resumed] == [(at, straight[0].lr, straight[0].digest)] * 3


def pickle_with_a_rule() -> None:
    job = Job(record=False)
    ddp, state, _ = build(job)
    state.switch_to_dense(rule=new_rule(), lr=lambda: 0.01)
    ddp(torch.ones(2, 7)).sum().backward()
    again = pickle.loads(pickle.dumps(state))
    ddp, _, _ = build(job, again)
    with pytest.raises(RuntimeError, match=r"pickled with a rule .*: call state\.switch_to_dense\("):
        ddp(torch.ones(2, 7)).sum().backward()


def test_a_learning_rate_is_not_pickled(ranks: RankPool) -> None:
    ranks.run(pickle_with_a_rule, world=1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "expected at_step or rule, one of both"),
        ({"at_step": 3, "rule": new_rule()}, "expected at_step or rule, one of both"),
        ({"at_step": 0}, "at_step: expected an integer above 0, got 0"),
        ({"at_step": 2.0}, "at_step: expected an integer above 0, got 2.0"),
        ({"at_step": True}, "at_step: expected an integer above 0, got True"),
        ({"rule": new_rule()}, "lr: expected one with a rule and only then, got None"),
        ({"at_step": 3, "lr": 0.1}, "lr: expected one with a rule and only then, got 0.1"),
    ],
)
def test_bad_switches_are_refused(arguments: dict[str, Any], text: str) -> None:
    state = MajorityVoteState()
    with pytest.raises(ValueError, match=f"^switch_to_dense: {text}"):
        state.switch_to_dense(**arguments)
    assert state.switched_at is None


# -- Statistics -------------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    outcome: Outcome
    rates: list[dict[str, ParameterStats]]  # after each step
    sent: list[int]
    received: list[int]


def watch(job: Job) -> Watched:
    ddp, state, outcome = build(job)
    watched = Watched(outcome, [], [], [])
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    for x in batches(job.steps, dist.get_rank()):
        step(ddp, optimizer, job, x)
        trained = {name: p.grad for name, p in ddp.module.named_parameters() if p.grad is not None}
        outcome.voted.append({name: in_memory_order(gradient) for name, gradient in trained.items()})
        if job.options.get("track_agreement"):
            watched.rates.append(state.stats(per_parameter=True))
        watched.sent.append(state.stats().bytes_sent)
        watched.received.append(state.stats().bytes_received)
    outcome.stats = state.stats().as_dict()
    outcome.digest = digest(ddp.module)
    return watched


AGREEING: dict[str, dict[str, Any]] = {
    "binary": {"zeros": "positive"},
    "binary, zero ties": {"zeros": "positive", "ties": "zero"},
    "ternary": {"abstain": True},
    "ternary, quorum": {"abstain": 1e-3, "quorum": 0.5, "topology": "server"},
}


@pytest.mark.parametrize("model", ["branches", "rows", "frozen"])
@pytest.mark.parametrize("options", AGREEING)
def test_agreement_is_that_of_the_votes(ranks: RankPool, options: str, model: str) -> None:
    of_votes = {"momentum": 0.0, "track_agreement": True, "scale": 0.5, **AGREEING[options]}
    excluded = parameter_names(model)[-1]
    job = Job(
        model,
        steps=5,
        options={**of_votes, "exclude": [excluded]},
        ddp={"find_unused_parameters": model == "branches", **TINY_BUCKETS},
        weights=(1, 3, 2),
    )
    by_rank = ranks.run(watch, job, world=3)
    threshold = 1e-3 if "quorum" in of_votes else 0.0
    unseen = torch.zeros if "abstain" in of_votes else torch.ones  # the gradient of what nobody uses stays None
    without_vote, undecided, total = [0, 0, 0], 0, 0
    for i in range(job.steps):
        assert all(watched.rates == by_rank[0].rates for watched in by_rank)
        expected = {}
        for name, gradient in by_rank[0].outcome.local[i].items():
            if name == excluded:
                continue
            outcome = by_rank[0].outcome.voted[i].get(name, unseen(gradient.shape)).sign()
            agreement = margin = 0.0
            for rank, (watched, weight) in enumerate(zip(by_rank, job.weights, strict=True)):
                own = watched.outcome.local[i][name]
                if "abstain" in of_votes:
                    vote = torch.where(own.abs() > threshold, own.sign(), 0.0)
                    without_vote[rank] += int((vote == 0).sum())
                else:
                    vote = torch.where(own >= 0, 1.0, -1.0)
                    without_vote[rank] += int((own == 0).sum())
                agreement += weight * (vote == outcome).double().mean().item()
                margin += weight * (vote * outcome).double().mean().item()
            expected[name] = agreement / 6, margin / 6
            total += outcome.numel()
            undecided += int((outcome == 0).sum())
        if i + 1 < job.steps:  # known with the next vote
            found = by_rank[0].rates[i + 1]
            assert set(found) == set(expected)
            for name, rates in expected.items():
                assert (found[name].agreement, found[name].margin) == pytest.approx(rates, abs=1e-6), (i, name)
    assert by_rank[0].rates[0] == {}
    for rank, watched in enumerate(by_rank):
        assert watched.outcome.stats["zero_rate"] == without_vote[rank] / total
        if options != "binary":
            assert watched.outcome.stats["tie_rate"] == undecided / total


def test_agreement_must_be_asked_for() -> None:
    with pytest.raises(RuntimeError, match="per_parameter: expected a state with track_agreement=True"):
        MajorityVoteState().stats(per_parameter=True)
    with pytest.raises(RuntimeError, match="stats: the parameters' names are not known"):
        MajorityVoteState(track_agreement=True).stats(per_parameter=True)


@pytest.mark.parametrize("topology", ["sharded", "allgather", "server"])
@pytest.mark.parametrize(
    ("options", "up", "down", "dense"),
    [
        ({"abstain": True}, 2, 2, []),
        ({"ties": "zero"}, 1, 2, []),
        ({"quorum": 0.5}, 1, 2, []),
        ({"dense_steps": 9}, 0, 0, [350, 35, 5]),
        ({"exclude": ["rows.weight"]}, 1, 1, [350]),
    ],
    ids=str,
)
def test_traffic(ranks: RankPool, topology: str, options: dict[str, Any], up: int, down: int, dense: list[int]) -> None:
    """Planes and means in blocks of 64 coordinates, and a trailer, in each row of a message."""
    world = 3
    job = Job("rows", steps=4, options={**options, "topology": topology}, record=False)
    shards = world if topology == "sharded" else 1
    blocks = sum(-(-numel // 64) for numel in (350, 35, 5) if numel not in dense)
    of_means = 4 * 64 * -(-sum(dense) // (64 * shards))
    sent, back = (8 * planes * -(-blocks // shards) + of_means + 4 * TRAILER_WORDS for planes in (up, down))
    for rank, watched in enumerate(ranks.run(watch, job, world=world)):
        others = world - 1
        expected = {
            "sharded": (others * (sent + back),) * 2,
            "allgather": (others * sent,) * 2,
            "server": (others * back, others * sent) if rank == 0 else (sent, back),
        }[topology]
        assert (watched.sent[3] - watched.sent[1], watched.received[3] - watched.received[1]) == (
            2 * expected[0],
            2 * expected[1],
        )


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
