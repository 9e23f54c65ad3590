"""The calibrated switch, on numbers worked out by hand and on a quadratic."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from signvote.ddp.hybrid import CalibratedSwitch


def test_the_calibrated_learning_rate_is_that_of_a_step_of_the_same_length() -> None:
    """With one gradient for ever it is ηd / |g|₁, and the step of SGD, projected on that of signs, is that of signs."""
    g = np.array([3.0, -1.0, 0.5, -0.25])
    s, lr = np.sign(g), 0.01
    switch = CalibratedSwitch(beta=0.9)
    answers = [switch.update(float(s @ g), g.size, lr) for _ in range(12)]
    gamma = switch.learning_rate
    assert gamma is not None
    assert gamma == pytest.approx(0.01 * 4 / 4.75)
    assert answers == [None] * 9 + [gamma] * 3  # the average is one of 1 / (1 - β) steps
    sgd, signs = -gamma * g, -lr * s
    assert (sgd @ signs) / (signs @ signs) == pytest.approx(1)
    assert (switch.steps, switch.skipped) == (10, 0)


def test_average_by_hand() -> None:
    switch = CalibratedSwitch(beta=0.5, tolerance=1e-3)
    assert switch.average is None
    assert switch.update(1.0, 2, 0.5) is None  # calibrated: 1
    assert switch.average == 1.0
    assert switch.update(0.25, 2, 0.5) is None  # 4: (0.25 + 2) / 0.75
    assert switch.average == pytest.approx(3)
    assert switch.update(1 / 3, 2, 0.5) == pytest.approx(3)  # 3: (1.125 + 1.5) / 0.875
    assert switch.update(1.0, 2, 0.5) == pytest.approx(3)  # for ever


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e9])
def test_the_unit_of_the_learning_rate_is_no_matter(unit: float) -> None:
    switches = CalibratedSwitch(beta=0.9, tolerance=0.02), CalibratedSwitch(beta=0.9, tolerance=0.02)
    rng = np.random.default_rng(0)
    answers = []
    for dot in rng.uniform(1, 3, 300):
        answers.append([switch.update(dot, 1, lr) for switch, lr in zip(switches, (1.0, unit), strict=True)])
    assert answers[-1][0] is not None
    for plain, scaled in answers:
        assert scaled == (None if plain is None else pytest.approx(plain * unit))


@pytest.mark.parametrize(
    ("dot", "numel", "lr"),
    [
        *((dot, 4, 0.1) for dot in (-1.0, 0.0, -0.0, math.nan, math.inf, -math.inf)),
        (5e-324, 4, 1e9),
        (1.0, 0, 0.1),
        (1.0, 4, 0.0),
    ],
)
def test_a_step_that_says_nothing_is_skipped(dot: float, numel: int, lr: float) -> None:
    switch = CalibratedSwitch(beta=0.5)
    switch.update(1.0, 4, 0.1)
    for _ in range(5):
        assert switch.update(dot, numel, lr) is None
    assert switch.average == pytest.approx(0.4)
    assert (switch.steps, switch.skipped) == (1, 5)
    assert switch.update(1.0, 4, 0.1) == pytest.approx(0.4)


def test_a_resumed_switch_decides_the_same() -> None:
    rng = np.random.default_rng(1)
    dots = rng.uniform(1, 5, 400).tolist()
    straight, resumed = CalibratedSwitch(beta=0.95, tolerance=0.02), CalibratedSwitch()
    for dot in dots[:20]:
        straight.update(dot, 10, 0.1)
    assert straight.learning_rate is None
    for dot in dots[20:]:
        resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
        answers = straight.update(dot, 10, 0.1), resumed.update(dot, 10, 0.1)
        assert answers[0] == answers[1]
    assert resumed.state_dict() == straight.state_dict()
    assert straight.learning_rate is not None


@pytest.mark.parametrize("bad", [None, {}, {"beta": 0.9}])
def test_load_refuses_other_dicts(bad: Any) -> None:
    switch = CalibratedSwitch()
    before = switch.state_dict()
    with pytest.raises(ValueError, match=r"CalibratedSwitch\.load_state_dict: expected a dict with \['beta', "):
        switch.load_state_dict(bad)
    assert switch.state_dict() == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CalibratedSwitch(beta=1.0), r"beta: expected a number in \[0, 1\), got 1\.0"),
        (lambda: CalibratedSwitch(beta=-0.1), "beta: "),
        (lambda: CalibratedSwitch(tolerance=0.0), r"tolerance: expected a finite number above 0, got 0\.0"),
        (lambda: CalibratedSwitch(tolerance=math.inf), "tolerance: "),
        (lambda: CalibratedSwitch(tolerance="x"), "tolerance: .* got 'x'"),  # type: ignore[arg-type]
        (lambda: CalibratedSwitch().update(1.0, -1, 0.1), "numel: expected an integer of at least 0, got -1"),
        (lambda: CalibratedSwitch().update(1.0, 2.0, 0.1), "numel: "),  # type: ignore[arg-type]
        (lambda: CalibratedSwitch().update(1.0, 2, -0.1), r"lr: expected a finite number of at least 0, got -0\.1"),
        (lambda: CalibratedSwitch().update(1.0, 2, math.nan), "lr: "),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^CalibratedSwitch: {message}"):
        call()


@pytest.mark.parametrize("seed", range(5))
def test_sgd_goes_on_descending(seed: int) -> None:
    """A noisy quadratic, 4 workers with momentum: votes until the switch, then SGD at its learning rate."""
    rng = np.random.default_rng(seed)
    curvature, lr, workers = np.logspace(-1, 0, 100), 1e-3, 4
    x, momenta = rng.standard_normal(100), np.zeros((workers, 100))
    switch = CalibratedSwitch(beta=0.99)
    start, losses = float(curvature @ x**2), []
    learning_rate = None
    for _ in range(3000):
        losses.append(float(curvature @ x**2))
        gradients = curvature * x + 0.3 * rng.standard_normal((workers, 100))
        if learning_rate is not None:
            x -= learning_rate * gradients.mean(axis=0)
            continue
        momenta = 0.9 * momenta + 0.1 * gradients
        vote = np.sign(np.sign(momenta).sum(axis=0) + 0.5)
        # Each worker's own share; their mean is that of the mean gradient.
        learning_rate = switch.update(float((gradients @ vote).mean()), 100, lr)
        switched = len(losses)
        x -= lr * vote
    assert learning_rate == switch.learning_rate is not None
    assert 100 <= switched < 2000
    assert losses[switched] < 0.9 * start
    after = losses[switched:]
    assert max(after) < 1.05 * losses[switched]  # no jump
    assert np.mean(after[-200:]) < 0.5 * losses[switched]
