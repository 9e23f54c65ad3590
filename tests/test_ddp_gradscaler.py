"""The hook under a GradScaler that its state knows."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ddp_jobs import Job, Outcome, batches, build, digest, in_memory_order
from ranks import RankPool
from test_ddp_options import check_step, simulate
from test_ddp_training import TINY_BUCKETS

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


def train_with_a_scaler_that_is_not_enabled() -> list[float]:
    """Magnitudes of the votes, as scripts have them whose mixed precision can be turned off."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    ddp, state, _ = build(Job(options={"scale": scaler}, record=False))
    scaler.scale(ddp(torch.ones(2, 7)).sum()).backward()
    assert state.loss_scale == 1.0
    votes = [in_memory_order(p.grad) for p in ddp.parameters() if p.grad is not None]
    return sorted(set(torch.cat(votes).abs().tolist()))


def test_gradscaler_that_is_not_enabled(ranks: RankPool) -> None:
    assert ranks.run(train_with_a_scaler_that_is_not_enabled, world=2) == [[1.0]] * 2


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
