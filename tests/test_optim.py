"""signvote.optim against a plain loop, and in the company it has to work in: schedulers, GradScaler, clipping."""

import copy
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from ddp_jobs import mlp
from ranks import RankPool
from signvote.ddp import attach
from signvote.optim import SignSGD, Signum, signum_warmup_steps

OptimizerClass = type[SignSGD] | type[Signum]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIMIZERS = [SignSGD, Signum]


def reference(
    x: NDArray[Any],
    gradients: NDArray[Any],
    *,
    lr: float,
    weight_decay: float,
    maximize: bool,
    momentum: float = 0.0,
) -> NDArray[Any]:
    """The algorithm in NumPy, in the dtype of x: SignSGD is Signum without momentum."""
    scalar, v = x.dtype.type, np.zeros_like(x)
    for g in gradients:
        v = scalar(momentum) * v + scalar(1 - momentum) * g
        step = scalar(lr) * np.sign(v)
        x = x * scalar(1 - lr * weight_decay)
        x = x + step if maximize else x - step
    return x


def steps(
    optimizer: torch.optim.Optimizer, params: Sequence[Parameter], gradients: Iterable[Sequence[Tensor | None]]
) -> None:
    """One step for each row of gradients, which has one gradient for each parameter."""
    for row in gradients:
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else g.detach().clone()
        optimizer.step()


def random_parameters(seed: int, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (0,), (1,), (7, 5), (2, 3, 4), (1000,)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes for dtype in dtypes]
    tensors.append(torch.randn(8, 6, generator=generator).t())
    return [Parameter(t) for t in tensors]


def random_gradients(params: Sequence[Parameter], seed: int, count: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=generator).to(p.dtype) for p in params] for _ in range(count)]


def bits(tensors: Iterable[Tensor]) -> list[list[int]]:
    return [t.detach().contiguous().view(-1).view(torch.uint8).tolist() for t in tensors if t.numel()]


# Multiples of 1/8 and a momentum of few bits: every product and sum of a few steps is exact.
exact_gradients = st.lists(
    st.lists(st.integers(-64, 64).map(lambda n: n / 8), min_size=5, max_size=5), min_size=1, max_size=6
)


@given(
    gradients=exact_gradients,
    x=st.lists(st.floats(-10, 10, width=32), min_size=5, max_size=5),
    momentum=st.sampled_from([None, 0.0, 0.5, 0.75]),
    lr=st.sampled_from([0.0, 1e-4, 0.3, 2.0]),
    weight_decay=st.sampled_from([0.0, 0.01, 1.0]),
    maximize=st.booleans(),
    foreach=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_matches_the_algorithm(
    gradients: list[list[float]],
    x: list[float],
    momentum: float | None,
    lr: float,
    weight_decay: float,
    maximize: bool,
    foreach: bool,
    dtype: type[np.floating[Any]],
) -> None:
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
    p = Parameter(torch.from_numpy(np.array(x, dtype)))
    optimizer: torch.optim.Optimizer
    if momentum is None:
        optimizer = SignSGD([p], foreach=foreach, **options)
    else:
        options["momentum"] = momentum
        optimizer = Signum([p], foreach=foreach, **options)
    rows = np.array(gradients, dtype)
    steps(optimizer, [p], [[torch.from_numpy(g)] for g in rows])
    np.testing.assert_array_equal(p.detach().numpy(), reference(np.array(x, dtype), rows, **options), strict=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_half_dtypes_round_each_parameter_once_per_operation(
    optimizer_class: OptimizerClass, dtype: torch.dtype
) -> None:
    lr, weight_decay = 0.01, 0.1
    (p,) = params = [Parameter(torch.linspace(-2, 2, 333).to(dtype))]
    gradients = random_gradients(params, seed=1, count=20)
    expected, v = p.detach().clone(), torch.zeros(333, dtype=torch.float64)
    beta = 0.9 if optimizer_class is Signum else 0.0
    for (g,) in gradients:
        v = beta * v + (1 - beta) * g.double()
        expected = (expected.float() * (1 - lr * weight_decay)).to(dtype)
        expected = (expected.float() - lr * v.sign().float()).to(dtype)
    steps(optimizer_class(params, lr, weight_decay=weight_decay), params, gradients)
    assert torch.equal(p, expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_foreach_gives_the_same_bits(optimizer_class: OptimizerClass, maximize: bool, weight_decay: float) -> None:
    results = []
    for foreach in (False, True, None):
        params = random_parameters(seed=2)
        gradients = random_gradients(params, seed=3, count=10)
        rows = [[*row[:3], None, *row[4:]] for row in gradients]  # one parameter takes no part
        optimizer = optimizer_class(params, 1e-3, weight_decay=weight_decay, maximize=maximize, foreach=foreach)
        steps(optimizer, params, rows)
        state = [optimizer.state[p]["momentum_buffer"] for p in params if optimizer.state[p]]
        results.append((bits(params), bits(state)))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_a_zero_takes_no_step_and_a_non_finite_one_shows(
    optimizer_class: OptimizerClass, dtype: torch.dtype, foreach: bool
) -> None:
    nan, inf = float("nan"), float("inf")
    # 18 of each: vector code and the code for the rest
    gradient = torch.tensor([0.0, -0.0, 2.0, -2.0, nan, inf, -inf]).repeat(18).to(dtype)
    p = Parameter(torch.ones_like(gradient))
    steps(optimizer_class([p], 0.5, foreach=foreach), [p], [[gradient]])
    expected = torch.tensor([1.0, 1.0, 0.5, 1.5, nan, nan, nan]).repeat(18).to(dtype)
    assert torch.equal(p.isnan(), expected.isnan())
    assert torch.equal(p.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_gradient_has_a_sign(dtype: torch.dtype) -> None:
    finfo = torch.finfo(dtype)
    smallest = finfo.smallest_normal * finfo.eps
    p = Parameter(torch.zeros(2, dtype=dtype))
    steps(SignSGD([p], 1.0), [p], [[torch.tensor([smallest, -smallest], dtype=dtype)]])
    assert p.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 300), (torch.bfloat16, 300), (torch.float64, 1200)])
def test_a_coordinate_without_gradient_comes_to_rest(dtype: torch.dtype, count: int, foreach: bool) -> None:
    p = Parameter(torch.zeros(3, dtype=dtype))
    optimizer = Signum([p], lr=1.0, momentum=0.6, foreach=foreach)
    zero = torch.zeros(3, dtype=dtype)
    steps(optimizer, [p], [[torch.tensor([1.0, -1.0, 0.0], dtype=dtype)]] + [[zero]] * 3)
    assert p.tolist() == [-4.0, 4.0, 0.0]
    # log(smallest normal) / log(0.6): 171 steps for float32, 1387 for float64
    steps(optimizer, [p], [[zero]] * count * 2)
    at_rest = p.detach().clone()
    steps(optimizer, [p], [[zero]] * 50)
    assert torch.equal(p, at_rest)
    assert p[2] == 0
    # The momentum itself would never have got to 0.
    assert optimizer.state[p]["momentum_buffer"].count_nonzero() == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_momentum_keeps_what_a_half_dtype_would_lose(dtype: torch.dtype) -> None:
    # 0.001 a step beside a momentum of 1: less than half the spacing of bfloat16 there.
    p = Parameter(torch.zeros(1, dtype=dtype))
    optimizer = Signum([p], momentum=0.999)
    steps(optimizer, [p], [[torch.full((1,), 1000.0, dtype=dtype)]] + [[torch.ones(1, dtype=dtype)]] * 100)
    v = optimizer.state[p]["momentum_buffer"]
    assert v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert v.item() == pytest.approx(0.999**100 + 1 - 0.999**100, rel=1e-5)


def test_param_groups() -> None:
    a, b = (Parameter(torch.ones(2)) for _ in range(2))
    groups: list[dict[str, Any]] = [
        {"params": [a]},
        {"params": [b], "lr": 0.25, "momentum": 0.5, "weight_decay": 1.0},
    ]
    optimizer = Signum(groups, lr=0.5)
    steps(optimizer, [a, b], [[torch.ones(2)] * 2, [torch.full((2,), -2.0)] * 2])
    # a: v = 0.1, then -0.11. b: v = 0.5, then -0.75.
    assert a.tolist() == [1.0] * 2
    assert b.tolist() == [(1 * 0.75 - 0.25) * 0.75 + 0.25] * 2

    c = Parameter(torch.ones(1))
    optimizer.add_param_group({"params": c, "lr": 2.0, "maximize": True})
    steps(optimizer, [c], [[torch.ones(1)]])
    assert c.item() == 3.0


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


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_maximize_is_the_mirror_image(optimizer_class: OptimizerClass) -> None:
    up, down = (random_parameters(seed=8, dtypes=[torch.float32]) for _ in range(2))
    gradients = random_gradients(up, seed=9, count=10)
    steps(optimizer_class(up, 0.01, weight_decay=0.1, maximize=True), up, gradients)
    steps(optimizer_class(down, 0.01, weight_decay=0.1), down, [[-g for g in row] for row in gradients])
    assert bits(up) == bits(down)


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


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_parameters_without_gradient_are_left_alone(optimizer_class: OptimizerClass) -> None:
    used, unused = (Parameter(torch.ones(2)) for _ in range(2))
    optimizer = optimizer_class([used, unused], 0.5, weight_decay=0.1)
    steps(optimizer, [used, unused], [[torch.ones(2), None]])
    assert unused.tolist() == [1.0] * 2
    assert unused not in optimizer.state
    steps(optimizer_class([unused]), [unused], [[None]])  # no gradient at all


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1e-4}, ValueError, r"Signum: lr is -0\.0001, expected 0 <= lr < inf"),
        ({"lr": float("nan")}, ValueError, r"Signum: lr is nan"),
        ({"lr": float("inf")}, ValueError, r"Signum: lr is inf"),
        ({"lr": torch.tensor(1e-4)}, TypeError, r"Signum: lr is a Tensor, expected a float"),
        ({"lr": "1e-4"}, TypeError, r"Signum: lr is a str, expected a float"),
        ({"momentum": 1.0}, ValueError, r"Signum: momentum is 1\.0, expected 0 <= momentum < 1"),
        ({"momentum": -0.1}, ValueError, r"Signum: momentum is -0\.1"),
        ({"momentum": True}, TypeError, r"Signum: momentum is a bool, expected a float"),
        ({"weight_decay": -1}, ValueError, r"Signum: weight_decay is -1, expected 0 <= weight_decay < inf"),
        ({"weight_decay": None}, TypeError, r"Signum: weight_decay is a NoneType, expected a float"),
        ({"noise": -0.1}, ValueError, r"Signum: noise is -0\.1, expected 0 <= noise < inf"),
        ({"noise": "0.1"}, TypeError, r"Signum: noise is a str, expected a float"),
        ({"seed": 1.0}, TypeError, r"Signum: seed is a float, expected an int"),
        ({"seed": True}, TypeError, r"Signum: seed is a bool, expected an int"),
        ({"seed": 2**64}, ValueError, r"Signum: seed is 18446744073709551616, expected 0 <= seed < 2\*\*64"),
        ({"seed": -1}, ValueError, r"Signum: seed is -1"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    p, q = (Parameter(torch.ones(1)) for _ in range(2))
    with pytest.raises(error, match=message):
        Signum([p], **options)
    optimizer = Signum([p])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [q], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_numpy_scalars_and_integers_are_numbers(optimizer_class: OptimizerClass) -> None:
    p = Parameter(torch.ones(1))
    steps(optimizer_class([p], np.float64(0.5), weight_decay=1), [p], [[torch.ones(1)]])
    assert p.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_other_dtypes_are_refused(optimizer_class: OptimizerClass, dtype: torch.dtype) -> None:
    p = torch.zeros(1).to(dtype)
    message = rf"{optimizer_class.__name__}: parameter 1 of group 0 has dtype {dtype}, expected float16, bfloat16"
    with pytest.raises(TypeError, match=message):
        optimizer_class([torch.zeros(1), p])


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_sparse_gradients_are_refused_before_anything_is_changed(optimizer_class: OptimizerClass) -> None:
    dense = Parameter(torch.ones(2))
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = optimizer_class([dense, embedding.weight], 0.5)
    torch.autograd.backward(embedding(torch.tensor([1])).sum() + dense.sum())
    with pytest.raises(RuntimeError, match=rf"{optimizer_class.__name__} does not support gradients of layout"):
        optimizer.step()
    assert dense.tolist() == [1.0] * 2
    assert torch.equal(embedding.weight, before)
    assert not optimizer.state


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_converges_under_noise(optimizer_class: OptimizerClass, foreach: bool) -> None:
    torch.manual_seed(12)
    target = torch.linspace(-1, 1, 100)
    p = Parameter(torch.zeros(100))
    optimizer = optimizer_class([p], 0.02, foreach=foreach)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=2000)
    for _ in range(2000):
        steps(optimizer, [p], [[p.detach() - target + 0.5 * torch.randn(100)]])
        scheduler.step()
    assert (p - target).abs().mean() < 0.05


# -- Noise ------------------------------------------------------------------------------------------------------------


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def normal(count: int, seed: int, step: int, place: int) -> NDArray[np.float32]:
    """Noise as plain as can be: what every worker must draw."""
    stream = mix((mix((mix(seed) + step) % 2**64) + place) % 2**64)
    digits = [mix((stream + i // 4) % 2**64) >> 16 * (i % 4) & 0xFFFF for i in range(count)]
    return np.array([NormalDist().inv_cdf((digit + 0.5) / 65536) for digit in digits], np.float32)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_noise_is_added_to_the_step(
    optimizer_class: OptimizerClass, dtype: type[np.floating[Any]], foreach: bool, maximize: bool
) -> None:
    lr, noise, weight_decay, seed, scalar = 0.01, 0.3, 0.1, 2**64 - 3, dtype
    rng = np.random.default_rng(13)
    shapes = [(3, 7), (), (0,), (64,), (5,)]
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    gradients = [[rng.integers(-1, 2, shape).astype(dtype) for shape in shapes] for _ in range(3)]  # some are 0

    params = [Parameter(torch.from_numpy(x.copy())) for x in arrays]
    groups: list[dict[str, Any]] = [
        {"params": params[:2]},
        {"params": params[2:4]},
        {"params": params[4:], "noise": 0.0},
    ]
    options: dict[str, Any] = {"maximize": maximize, "foreach": foreach, "noise": noise, "seed": seed}
    optimizer = optimizer_class(groups, lr, weight_decay=weight_decay, **options)
    steps(optimizer, params, [[torch.from_numpy(g.copy()) for g in row] for row in gradients])

    beta = 0.9 if optimizer_class is Signum else 0.0
    for place, (x, p) in enumerate(zip(arrays, params, strict=True)):
        v = np.zeros_like(x)
        for step, row in enumerate(gradients):
            v = scalar(beta) * v + scalar(1 - beta) * row[place]
            update = (-1 if maximize else 1) * np.sign(v)
            if place < 4:
                update = normal(x.size, seed, step, place).astype(dtype).reshape(x.shape) * scalar(noise) + update
            x = x * scalar(1 - lr * weight_decay) - update * scalar(lr)
        np.testing.assert_array_equal(p.detach().numpy(), x)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_foreach_adds_the_same_noise(optimizer_class: OptimizerClass) -> None:
    results = []
    for foreach in (False, True):
        params = random_parameters(seed=14)
        rows = [[*row[:3], None, *row[4:]] for row in random_gradients(params, seed=15, count=5)]
        steps(optimizer_class(params, 1e-3, noise=0.5, weight_decay=0.1, foreach=foreach), params, rows)
        results.append(bits(params))
    assert results[0] == results[1]


def test_noise_is_normal_and_white() -> None:
    """Moments within five standard errors, within and between steps, parameters and seeds."""
    count = 200_000
    draws = []
    for seed in (0, 1):
        params = [Parameter(torch.zeros(count)) for _ in range(2)]
        optimizer = SignSGD(params, lr=1.0, noise=1.0, seed=seed)
        for _ in range(2):
            before = [p.detach().clone() for p in params]
            steps(optimizer, params, [[torch.zeros(count)] * 2])
            draws += [(b - p.detach()).double() for b, p in zip(before, params, strict=True)]
    for n in draws:
        for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
            assert abs((n**power).mean() - mean) < 5 * (variance / count) ** 0.5 + 0.003 * (power == 4)
        assert abs((n[:-1] * n[1:]).mean()) < 5 * count**-0.5
        assert abs((n[:-4] * n[4:]).mean()) < 5 * count**-0.5
    for i, n in enumerate(draws):
        for m in draws[:i]:
            assert abs((n * m).mean()) < 5 * count**-0.5


def test_no_quantile_is_near_the_middle_of_two_floats() -> None:
    """So a logarithm that is wrong in its last place, as it is on some machines, gives the same float32."""
    x = np.array([NormalDist().inv_cdf((k + 0.5) / 65536) for k in range(32768)])
    nearest = x.astype(np.float32)
    for neighbour in (-np.inf, np.inf):
        middle = (nearest.astype(np.float64) + np.nextafter(nearest, np.float32(neighbour)).astype(np.float64)) / 2
        assert np.min(np.abs((x - middle) / x)) > 1e-13


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_noise_resumes_bit_for_bit(optimizer_class: OptimizerClass, tmp_path: Path) -> None:
    params = random_parameters(seed=16)
    gradients = random_gradients(params, seed=17, count=6)
    optimizer = optimizer_class(params, 1e-3, noise=0.2, seed=5)
    steps(optimizer, params, gradients[:3])
    torch.save([[p.detach() for p in params], optimizer.state_dict()], tmp_path / "checkpoint.pt")
    twin = copy.deepcopy(optimizer)
    steps(optimizer, params, gradients[3:])

    saved, state_dict = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed_params = [Parameter(t) for t in saved]
    resumed = optimizer_class(resumed_params)
    resumed.load_state_dict(state_dict)
    steps(resumed, resumed_params, gradients[3:])
    steps(twin, twin.param_groups[0]["params"], gradients[3:])
    assert bits(params) == bits(resumed_params) == bits(twin.param_groups[0]["params"])


def test_a_checkpoint_without_noise_is_loaded() -> None:
    p = Parameter(torch.ones(3))
    state_dict = SignSGD([p], 0.5).state_dict()
    for option in ("noise", "seed", "noise_steps"):
        del state_dict["param_groups"][0][option]
    optimizer = SignSGD([p], 0.1, noise=1.0)
    optimizer.load_state_dict(state_dict)
    steps(optimizer, [p], [[torch.ones(3)]])
    assert p.tolist() == [0.5] * 3


def test_noise_spares_parameters_without_gradient_and_changes_nothing_for_the_others() -> None:
    results = []
    for skipped in (False, True):
        params = [Parameter(torch.zeros(9)) for _ in range(3)]
        optimizer = SignSGD(params, 0.5, noise=1.0)
        steps(optimizer, params, [[torch.ones(9), None if skipped else torch.ones(9), torch.ones(9)]] * 2)
        results.append(bits(params))
    assert results[0][::2] == results[1][::2]
    assert not any(results[1][1])


def test_noise_can_have_a_schedule() -> None:
    p, q = (Parameter(torch.zeros(50)) for _ in range(2))
    optimizer = SignSGD([p], 0.5, noise=1.0)
    optimizer.param_groups[0]["noise"] = 0.0
    steps(optimizer, [p], [[torch.ones(50)]])
    assert p.tolist() == [-0.5] * 50
    optimizer.param_groups[0]["noise"] = 0.25
    steps(optimizer, [p], [[torch.zeros(50)]])
    steps(SignSGD([q], 0.5, noise=0.25), [q], [[torch.zeros(50)]])
    torch.testing.assert_close(p + 0.5, q)  # the first noise that was drawn


def test_noise_does_not_hide_a_non_finite_gradient() -> None:
    for foreach in (False, True):
        p = Parameter(torch.zeros(3))
        steps(SignSGD([p], noise=1.0, foreach=foreach), [p], [[torch.tensor([math.nan, math.inf, 1.0])]])
        assert p.isnan().tolist() == [True, True, False]


DIGEST_OF_NOISE = """
import hashlib, torch
from signvote.optim import SignSGD
params = [torch.nn.Parameter(torch.arange(-size, size) / 1024) for size in (503, 32)]
for foreach in (False, True):
    optimizer = SignSGD(params, 0.1, noise=0.7, weight_decay=0.1, foreach=foreach)
    for _ in range(3):
        for p in params:
            p.grad = p.detach().clone().add_(0.25)
        optimizer.step()
print(hashlib.sha256(torch.cat(params).detach().numpy().tobytes()).hexdigest())
"""


def test_noise_is_the_same_on_other_cpus() -> None:
    """torch.randn is not, nor is x + a·y: their bits depend on which of torch's kernels the CPU can run."""
    digests = set()
    for kernels in ("default", "avx2"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": kernels}
        command = [sys.executable, "-c", DIGEST_OF_NOISE]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        digests.add(run.stdout)
    assert len(digests) == 1


def trained_with_noise(noise: float) -> list[list[int]]:
    torch.manual_seed(18)  # not of the noise: ranks differ in the state of torch's generators
    ddp = DistributedDataParallel(mlp())
    attach(ddp, momentum=0.9)
    optimizer = SignSGD(ddp.parameters(), 0.01, noise=noise, weight_decay=0.1)
    torch.manual_seed(torch.distributed.get_rank())
    for _ in range(5):
        optimizer.zero_grad()
        ddp(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
    return bits(ddp.parameters())


def test_replicas_draw_the_same_noise(ranks: RankPool) -> None:
    first, *others = ranks.run(trained_with_noise, 0.5, world=3)
    assert all(other == first for other in others)
    assert ranks.run(trained_with_noise, 0.0, world=1)[0] != first


# -- The warm-up of Theorem 3 -----------------------------------------------------------------------------------------


def meets_theorem_3(beta: Fraction, steps: int) -> bool:
    first = Fraction(steps, 2) * beta**steps <= 1 / (1 - beta**2) / (steps + 1)
    return first and beta ** (steps + 1) <= Fraction(1, 2)


@pytest.mark.parametrize("beta", [i / 64 for i in range(63)] + [0.1, 0.7, 0.75, 0.79, 0.8, 0.9, 0.95, 0.98])
def test_warmup_steps_are_the_smallest_that_theorem_3_allows(beta: float) -> None:
    exact = Fraction(beta)
    assert signum_warmup_steps(beta) == next(c for c in range(1, 1000) if meets_theorem_3(exact, c))


def test_warmup_steps_of_the_paper() -> None:
    assert signum_warmup_steps(0.9) == 54
    assert signum_warmup_steps(0) == signum_warmup_steps(0.0) == 1
    assert signum_warmup_steps(np.float64(0.9)) == 54


@pytest.mark.parametrize("beta", [0.9999, 1 - 1e-9, math.nextafter(1, 0)])
def test_warmup_steps_near_one(beta: float) -> None:
    """Right where a float of the number of steps is not, and no search step by step."""
    steps, tiny = signum_warmup_steps(beta), 1 - Fraction(beta)
    # log β = -ε - ε²/2 - ..., and 1 - β² = ε (2 - ε)
    log_beta = -float(tiny) - float(tiny) ** 2 / 2 - float(tiny) ** 3 / 3
    excess = [
        math.log(c) + math.log(c + 1) + c * log_beta + math.log(tiny * (2 - tiny) / 2) for c in (steps - 1, steps)
    ]
    assert excess[0] == pytest.approx(0, abs=1e-4)
    if beta == 0.9999:
        assert excess[0] > 0 >= excess[1]


@pytest.mark.parametrize("beta", [1.0, -0.1, math.nan, math.inf])
def test_warmup_steps_refuses_a_beta_out_of_range(beta: float) -> None:
    with pytest.raises(ValueError, match=r"signum_warmup_steps: beta is .*, expected 0 <= beta < 1"):
        signum_warmup_steps(beta)


@pytest.mark.parametrize("beta", ["0.9", None, True, torch.tensor(0.9)])
def test_warmup_steps_refuses_what_is_no_number(beta: Any) -> None:
    with pytest.raises(TypeError, match=r"signum_warmup_steps: beta is a \w+, expected a float"):
        signum_warmup_steps(beta)
