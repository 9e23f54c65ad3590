"""From votes to means for good: at a step that was given, or when the calibrated rule says so."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from signvote.ddp.hybrid import CalibratedSwitch

_log = logging.getLogger("signvote")


@dataclass
class _Progress:
    """sᵀg of one step.

    ``dot``: a rank's own, and the mean over all ranks once it is known; None as long as nothing is. ``numel``:
    coordinates that step. ``lr``: of the sign optimizer in that step.
    """

    dot: float | None = None
    numel: int = 0
    lr: float = 0.0


class Switching:
    """What decides when a state's votes end.

    The rule is of sᵀg with the mean gradient g. That is the mean of each rank's own sᵀg, which it knows when the vote
    is back: it goes out with the next step's vote. So a step counts in the rule two steps later, on all ranks alike.

    Args:
        at_step: The first step of which the mean is taken, None if the rule says.
        rule: Counts steps, and knows the learning rate of SGD.
        lr: The learning rate of the sign optimizer, or what returns that of the current step.

    Attributes:
        switched_at: The first step of which the mean is taken, once that is decided.
    """

    def __init__(
        self, at_step: int | None, rule: CalibratedSwitch | None, lr: float | Callable[[], float] | None
    ) -> None:
        self.rule = rule
        self.switched_at = at_step
        self._lr = lr
        # Of the last step and of the one before, bucket by bucket: sᵀg as far as nobody has waited for it.
        self._voted_dots: list[Callable[[], float]] = []
        self._sent_dots: list[Callable[[], float]] = []
        self._voted, self._sent, self._learned = _Progress(), _Progress(), _Progress()

    @property
    def needs_progress(self) -> bool:
        return self.rule is not None

    def is_over(self, step: int) -> bool:
        """Whether ``step`` takes the mean."""
        return self.switched_at is not None and step >= self.switched_at

    def begin(self, step: int) -> None:
        """Before a step's first bucket: see what the rule says of the last one whose mean is known."""
        if self.rule is None or self.is_over(step):
            return
        if self._learned.dot is not None:
            learning_rate = self.rule.update(self._learned.dot, self._learned.numel, self._learned.lr)
            if learning_rate is not None and self.switched_at is None:
                self.switched_at = step
                _log.info("from step %d on the mean, for SGD with a learning rate of %g", step, learning_rate)
        self._sent, self._voted, self._learned = self._voted, _Progress(), _Progress()
        self._sent_dots, self._voted_dots = self._voted_dots, []
        if self._lr is None:
            raise RuntimeError(
                "signvote: this state was pickled with a rule to switch by: call state.switch_to_dense("
                "rule=state.switching.rule, lr=...) before use"
            )
        self._voted.lr = float(self._lr() if callable(self._lr) else self._lr)

    def add(self, dot: Callable[[], float] | None, numel: int, loss_scale: float) -> None:
        """Of one bucket of the current step; None if it has no vote that means anything.

        ``dot`` may wait for a device, and is for gradients that were multiplied by ``loss_scale``.
        """
        self._voted_dots.append(lambda: math.nan if dot is None else dot() / loss_scale)
        self._voted.numel += numel

    def own(self) -> tuple[float, float]:
        """What this rank sends of the step before: sᵀg and the learning rate. May wait for a device."""
        _settle(self._sent, self._sent_dots)
        return (math.nan if self._sent.dot is None else self._sent.dot), self._sent.lr

    def learn(self, dot: float, lr: float) -> None:
        """The means of what all ranks sent: the same for the rule of each of them."""
        if self._sent.dot is not None:
            self._learned = _Progress(dot, self._sent.numel, lr)

    def described(self) -> str:
        """For the comparison between ranks."""
        return f"{self.rule!r} at {self.switched_at}"

    def state_dict(self) -> dict[str, Any]:
        """Between two steps."""
        _settle(self._voted, self._voted_dots)
        return {
            "switched_at": self.switched_at,
            "rule": None if self.rule is None else self.rule.state_dict(),
            "voted": asdict(self._voted),
            "learned": asdict(self._learned),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if (saved["rule"] is None) != (self.rule is None):
            raise ValueError("load_state_dict: switch: expected a rule if and only if there was one when it was saved")
        switched_at = self.switched_at if saved["switched_at"] is None else saved["switched_at"]
        if self.rule is None and self.switched_at not in (None, switched_at):
            raise ValueError(f"load_state_dict: switch: expected at_step {self.switched_at}, as set, got {switched_at}")
        voted, learned = _Progress(**saved["voted"]), _Progress(**saved["learned"])
        if self.rule is not None:
            self.rule.load_state_dict(saved["rule"])
        self.switched_at, self._voted, self._learned = switched_at, voted, learned
        self._voted_dots = []


def _settle(progress: _Progress, dots: list[Callable[[], float]]) -> None:
    """Wait for what ``dots`` say, once."""
    if dots:
        progress.dot = sum(dot() for dot in dots)
        dots.clear()
