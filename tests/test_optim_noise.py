"""The noise of SignSGD and Signum against the same in plain integers, on replicas, resumed, and on other CPUs."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from ddp_jobs import mlp
from optimizer_steps import OPTIMIZERS, OptimizerClass, bits, random_gradients, random_parameters, steps
from ranks import RankPool
from signvote.ddp import attach
from signvote.optim import SignSGD, Signum


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
