"""When to go from voting to SGD, and with which learning rate: one scalar per step decides.

The rule is that of SWATS, from Adam to SGD: N. S. Keskar and R. Socher, "Improving Generalization Performance by
Switching from Adam to SGD" (2017, arXiv 1712.07628). Chen and Wang (2026, arXiv 2604.25550) switch from a sign method
by a calibration of this kind; their full text was not at hand, and the formulas here are derived for a vote from those
of SWATS.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any


class CalibratedSwitch:
    r"""Find the moment to switch from votes to SGD, and the learning rate to go on with.

    A step of signs is :math:`p_k = -\eta_k s_k`, with the vote s of ±1 in d coordinates and the learning rate
    :math:`\eta`. The learning rate at which a step of SGD, projected on :math:`p_k`, is :math:`p_k` itself is

    .. math::
        \gamma_k = \frac{p_k^T p_k}{-p_k^T g_k} = \frac{\eta_k d}{s_k^T g_k}

    with the mean gradient g. Its exponential average :math:`\lambda_k = \beta \lambda_{k-1} + (1 - \beta) \gamma_k`,
    corrected for its start at 0, is :math:`\hat\lambda_k = \lambda_k / (1 - \beta^k)`. It is time to switch when

    .. math::
        |\hat\lambda_k - \gamma_k| < \mathrm{tolerance} \cdot \hat\lambda_k

    and SGD goes on with :math:`\hat\lambda_k`: as it is without momentum, times :math:`1 - \mu` with momentum
    :math:`\mu`.

    Two things differ from SWATS. Its tolerance is absolute, 1e-9, but :math:`\gamma` is a learning rate, whose order of
    magnitude is the model's: so here it is relative. And its rule may hold in the second step, where the average is
    that of two numbers: here it has to be the average of :math:`1 / (1 - \beta)` steps.

    A step whose :math:`\gamma` is not a number above 0 says nothing about a learning rate, and is skipped: the vote
    points uphill, there is no gradient, or it is not finite. An optimizer with weight decay adds to :math:`p_k` what is
    not counted here.

    Of noisy gradients, :math:`\gamma_k` scatters around its average, so that chance decides when the two meet: a
    smaller tolerance waits longer. Where gradients vanish, :math:`\gamma` grows, and may be more than SGD is
    stable with.

    Args:
        beta: Constant of the average, 0 <= β < 1.
        tolerance: How close the two have to be, relative to the average, above 0.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        switch = CalibratedSwitch()
        learning_rate = switch.update(dot, numel, lr)  # in each step, with the same numbers on all ranks
        if learning_rate is not None:
            optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    """

    def __init__(self, *, beta: float = 0.999, tolerance: float = 0.01) -> None:
        self._beta = _checked("beta", beta, "a number in [0, 1)", lambda value: 0 <= value < 1)
        self._tolerance = _checked(
            "tolerance", tolerance, "a finite number above 0", lambda value: 0 < value < math.inf
        )
        self._sum = 0.0
        self._weight = 0.0  # 1 - β^k; a power is not the same bits on every machine
        self._steps = 0
        self._skipped = 0
        self._learning_rate: float | None = None

    def update(self, dot: float, numel: int, lr: float) -> float | None:
        """Count a step; return the learning rate of SGD if it is time to switch, and ever after, else None.

        Only sums, products and quotients of the arguments: ranks that have the same bits here decide the same.

        Args:
            dot: :math:`s^T g`, over all coordinates on which there is a vote. With a mean over ranks it is the mean of
                their own :math:`s^T g_m`.
            numel: d, the number of coordinates that step: without those where a vote with abstention is 0.
            lr: η, the learning rate of the step.

        Raises:
            ValueError: If ``numel`` or ``lr`` is out of range.
        """
        _checked("lr", lr, "a finite number of at least 0", lambda value: 0 <= value < math.inf)
        if isinstance(numel, bool) or not isinstance(numel, int) or numel < 0:
            raise ValueError(f"CalibratedSwitch: numel: expected an integer of at least 0, got {numel!r}")
        if self._learning_rate is not None:
            return self._learning_rate
        gamma = float(lr) * numel / float(dot) if dot != 0 else math.nan
        if not 0 < gamma < math.inf:
            self._skipped += 1
            return None
        self._sum = self._beta * self._sum + (1 - self._beta) * gamma
        self._weight = self._beta * self._weight + (1 - self._beta)
        self._steps += 1
        average = self._sum / self._weight
        if self._steps >= round(1 / (1 - self._beta)) and abs(average - gamma) < self._tolerance * average:
            self._learning_rate = average
        return self._learning_rate

    @property
    def learning_rate(self) -> float | None:
        """Of SGD, once it is time to switch."""
        return self._learning_rate

    @property
    def average(self) -> float | None:
        r""":math:`\hat\lambda_k`: the learning rate of SGD by now. None before the first step that counts."""
        return self._sum / self._weight if self._steps else None

    @property
    def steps(self) -> int:
        """Steps that count in the average."""
        return self._steps

    @property
    def skipped(self) -> int:
        """Steps that do not."""
        return self._skipped

    def state_dict(self) -> dict[str, Any]:
        """All there is to it, the arguments too, as plain numbers: the same on all ranks."""
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` has returned.

        Raises:
            ValueError: If it is not such a dict. Nothing is changed then.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != set(_STATE):
            got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"CalibratedSwitch.load_state_dict: expected a dict with {sorted(_STATE)}, got {got}")
        for name in _STATE:
            setattr(self, f"_{name}", state_dict[name])

    def __repr__(self) -> str:
        return f"CalibratedSwitch(beta={self._beta}, tolerance={self._tolerance})"


_STATE = ("beta", "tolerance", "sum", "weight", "steps", "skipped", "learning_rate")


def _checked(name: str, value: object, expected: str, holds: Callable[[float], bool]) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not holds(number):
        raise ValueError(f"CalibratedSwitch: {name}: expected {expected}, got {value!r}")
    return number
