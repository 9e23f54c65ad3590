"""SignSGD and Signum in the company they have to work in: checkpoints, copies, closures, GradScaler, clipping,
schedulers.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from optimizer_steps import OPTIMIZERS, OptimizerClass, bits, random_gradients, random_parameters, steps
from signvote.optim import SignSGD, Signum


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_resume_continues_bit_for_bit(optimizer_class: OptimizerClass, foreach: bool, tmp_path: Path) -> None:
    params = random_parameters(seed=4)
    gradients = random_gradients(params, seed=5, count=20)
    optimizer = optimizer_class(params, 1e-3, weight_decay=0.1, foreach=foreach)
    steps(optimizer, params, gradients[:10])
    torch.save([[p.detach() for p in params], optimizer.state_dict()], tmp_path / "checkpoint.pt")
    steps(optimizer, params, gradients[10:])

    saved, state_dict = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed_params = [Parameter(t) for t in saved]
    resumed = optimizer_class(resumed_params, 7.0)
    resumed.load_state_dict(state_dict)
    assert resumed.param_groups[0]["lr"] == 1e-3
    steps(resumed, resumed_params, gradients[10:])
    assert bits(resumed_params) == bits(params)
    for p, q in zip(params, resumed_params, strict=True):
        assert bits(resumed.state[q].values()) == bits(optimizer.state[p].values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_a_copy_continues_bit_for_bit(
    optimizer_class: OptimizerClass, copied: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]
) -> None:
    params = random_parameters(seed=6)
    gradients = random_gradients(params, seed=7, count=10)
    optimizer = optimizer_class(params, 1e-3)
    steps(optimizer, params, gradients[:5])
    twin = copied(optimizer)
    twin_params = twin.param_groups[0]["params"]
    steps(optimizer, params, gradients[5:])
    steps(twin, twin_params, gradients[5:])
    assert bits(twin_params) == bits(params)


def test_load_state_dict_heeds_pre_hooks() -> None:
    p = Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = Signum([p])
    steps(optimizer, [p], [[torch.ones_like(p)]])
    state_dict = copy.deepcopy(optimizer.state_dict())

    def doubled(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {i: {"momentum_buffer": 2 * s["momentum_buffer"]} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(doubled)
    for _ in range(2):
        optimizer.load_state_dict(state_dict)
        v = optimizer.state[p]["momentum_buffer"]
        assert v.dtype == torch.float32
        assert torch.equal(v, torch.full((2,), 0.2))


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_closure(optimizer_class: OptimizerClass) -> None:
    p = Parameter(torch.ones(3))
    optimizer = optimizer_class([p], 0.5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        torch.autograd.backward(loss)
        return loss.item()

    with torch.no_grad():
        assert optimizer.step(closure) == 3.0
    assert p.tolist() == [0.5] * 3
    assert optimizer.step() is None


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("max_norm", [None, 1.0, 1e-4])
def test_neither_loss_scale_nor_clipping_changes_a_step_of_signsgd(scale: float, max_norm: float | None) -> None:
    plain, scaled = (random_parameters(seed=10, dtypes=[torch.float32]) for _ in range(2))
    plain_optimizer, optimizer = SignSGD(plain, 1e-3), SignSGD(scaled, 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for row in random_gradients(plain, seed=11, count=5):
        votes = [g.sign() for g in row]
        steps(plain_optimizer, plain, [votes])
        # As under the hook: the vote is ±1 whatever the scale of the loss was.
        scaler.scale(torch.zeros(()))
        for p, vote in zip(scaled, votes, strict=True):
            p.grad = vote.clone()
        scaler.unscale_(optimizer)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(scaled, max_norm)
        scaler.step(optimizer)
        scaler.update()
    assert bits(plain) == bits(scaled)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_grad_scaler_skips_a_non_finite_step(optimizer_class: OptimizerClass) -> None:
    p = Parameter(torch.ones(3))
    optimizer = optimizer_class([p], 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(p.sum())
    p.grad = torch.tensor([1.0, float("nan"), 1.0])
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert p.tolist() == [1.0] * 3
    assert not optimizer.state[p]


def test_a_scheduler_of_the_learning_rate() -> None:
    p = Parameter(torch.zeros(1))
    optimizer = SignSGD([p], 1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for expected in (-1.0, -1.5, -1.75):
        steps(optimizer, [p], [[torch.ones(1)]])
        scheduler.step()
        assert p.item() == expected


def test_a_scheduler_of_the_momentum() -> None:
    p = Parameter(torch.zeros(1))
    optimizer = Signum([p])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10, cycle_momentum=True)
    momenta = set()
    for _ in range(9):
        momenta.add(optimizer.param_groups[0]["momentum"])
        steps(optimizer, [p], [[torch.ones(1)]])
        scheduler.step()
    assert len(momenta) > 5
    assert p.item() < -1
