"""SignSGD and Signum against a plain loop: every dtype, option and implementation."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import Parameter

from optimizer_steps import DTYPES, OPTIMIZERS, OptimizerClass, bits, random_gradients, random_parameters, steps
from signvote.optim import SignSGD, Signum


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


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_maximize_is_the_mirror_image(optimizer_class: OptimizerClass) -> None:
    up, down = (random_parameters(seed=8, dtypes=[torch.float32]) for _ in range(2))
    gradients = random_gradients(up, seed=9, count=10)
    steps(optimizer_class(up, 0.01, weight_decay=0.1, maximize=True), up, gradients)
    steps(optimizer_class(down, 0.01, weight_decay=0.1), down, [[-g for g in row] for row in gradients])
    assert bits(up) == bits(down)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_parameters_without_gradient_are_left_alone(optimizer_class: OptimizerClass) -> None:
    used, unused = (Parameter(torch.ones(2)) for _ in range(2))
    optimizer = optimizer_class([used, unused], 0.5, weight_decay=0.1)
    steps(optimizer, [used, unused], [[torch.ones(2), None]])
    assert unused.tolist() == [1.0] * 2
    assert unused not in optimizer.state
    steps(optimizer_class([unused]), [unused], [[None]])  # no gradient at all


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
