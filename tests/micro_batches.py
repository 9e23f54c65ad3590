"""Gradients of micro-batches for tests of signvote.diagnostics, and their statistics in NumPy, all at once."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from signvote.diagnostics import GradientStatistics

Stack = dict[str, NDArray[np.float64]]


def reference(stack: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """All of it in two passes; row i is the gradient of micro-batch i."""
    n, noise = len(stack), stack - stack.mean(axis=0)
    m2, m3, m4 = ((noise**power).mean(axis=0) for power in (2, 3, 4))
    skewness = m3 / m2**1.5 * math.sqrt(n * (n - 1)) / (n - 2)
    kurtosis = ((n + 1) * (m4 / m2**2 - 3) + 6) * (n - 1) / ((n - 2) * (n - 3))
    return {
        "mean": stack.mean(axis=0),
        "standard_deviation": stack.std(axis=0, ddof=1),
        "signal_to_noise": abs(stack.mean(axis=0)) / stack.std(axis=0, ddof=1),
        "skewness": skewness,
        "excess_kurtosis": kurtosis,
        "bimodality": (skewness**2 + 1) / (kurtosis + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))),
    }


def statistics_of(stack: Stack, dtype: torch.dtype = torch.float64, **options: Any) -> GradientStatistics:
    statistics = GradientStatistics(**options)
    for i in range(len(next(iter(stack.values())))):
        statistics.update({name: torch.tensor(rows[i]).to(dtype) for name, rows in stack.items()})
    return statistics


def assert_equal(statistics: GradientStatistics, stack: Stack, rtol: float = 1e-9) -> None:
    for name, rows in stack.items():
        for what, expected in reference(rows).items():
            got = getattr(statistics, what)[name]
            assert got.dtype is torch.float64
            np.testing.assert_allclose(got.numpy(), expected, rtol=rtol, atol=rtol, err_msg=f"{what} of {name}")


def samples(n: int = 50, seed: int = 0) -> Stack:
    """Gradients that are skewed, far from 0 and of different sizes."""
    rng = np.random.default_rng(seed)
    return {
        "weight": 1e-3 * rng.exponential(size=(n, 4, 5)) + rng.normal(size=(4, 5)),
        "bias": rng.uniform(-1, 1, size=(n, 7)) + 1e4,
        "scalar": rng.normal(size=n),
    }
