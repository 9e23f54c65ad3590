"""signum_warmup_steps against the conditions of Theorem 3 in exact arithmetic."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from signvote.optim import signum_warmup_steps


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
