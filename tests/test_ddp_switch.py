"""The switch from votes to means: at a step that is given, and by a rule."""

import logging
import logging.handlers
import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ddp_jobs import Job, Outcome, batches, build, digest, in_memory_order, step
from ranks import RankPool
from signvote.ddp import CalibratedSwitch, MajorityVoteState
from test_ddp_checkpoints import through_a_file
from test_ddp_options import EVERYTHING, check_step, simulate
from test_ddp_training import TINY_BUCKETS


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
