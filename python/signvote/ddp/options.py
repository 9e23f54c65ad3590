"""The options of a vote: checked once, compared between ranks, pickled with the state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from fractions import Fraction
from typing import Any

from signvote.optim import signum_warmup_steps

TOPOLOGIES = ("sharded", "allgather", "server", "auto")
UNDECIDED = ("coin", "positive", "negative")
TIES = (*UNDECIDED, "zero")
NONFINITE = ("propagate", "raise", "ignore")
BACKENDS = ("gloo", "nccl")

MEAN_ABS = "mean_abs"
#: What stands for a GradScaler: the object itself belongs to this process.
LOSS_SCALE = "loss scale"
#: What a threshold begins with that is relative to the root mean square.
RELATIVE = "rms:"

Coefficients = tuple[float, float, float, float]


class Phase(Enum):
    """What happens to the voted coordinates in a step."""

    DENSE = "dense"  # the mean; momentum is kept up
    WARMUP = "warm-up"  # the vote of the gradients' signs; momentum is kept up
    VOTE = "vote"
    SWITCHED = "switched"  # the mean, for good

    @property
    def is_dense(self) -> bool:
        return self in (Phase.DENSE, Phase.SWITCHED)

    @property
    def as_planned(self) -> Phase:
        """What a bucket is laid out for: the warm-up differs in coefficients only."""
        return Phase.VOTE if self is Phase.WARMUP else self


@dataclass(frozen=True)
class Threshold:
    """A coordinate of no more than ``value`` abstains; ``is_relative``: to the parameter's root mean square."""

    value: float
    is_relative: bool


@dataclass(frozen=True)
class VoteOptions:
    """What every rank of a job must have in common. See :class:`signvote.ddp.MajorityVoteState` for the meanings."""

    momentum: float | tuple[float, float] = 0.9
    zeros: str = "coin"
    ties: str = "coin"
    scale: float | str = 1.0
    topology: str = "sharded"
    nonfinite: str = "propagate"
    abstain: bool | float | str = False
    quorum: int | float = 1
    warmup_steps: int | str = 0
    dense_steps: int = 0
    dither: float | Callable[[int], float] = 0.0
    track_agreement: bool = False
    backend: str = "gloo"
    seed: int = 0

    def __post_init__(self) -> None:
        # Stored as plain numbers, so that momentum=1/2 and momentum=numpy.float64(0.5) agree between ranks.
        object.__setattr__(self, "momentum", _checked_momentum(self.momentum))
        object.__setattr__(self, "scale", _checked_scale(self.scale))
        _check_choice("zeros", self.zeros, UNDECIDED)
        _check_choice("ties", self.ties, TIES)
        _check_choice("topology", self.topology, TOPOLOGIES)
        _check_choice("nonfinite", self.nonfinite, NONFINITE)
        object.__setattr__(self, "abstain", _checked_abstain(self.abstain))
        object.__setattr__(self, "quorum", _checked_quorum(self.quorum))
        object.__setattr__(self, "warmup_steps", self._checked_warmup())
        _check_integer("dense_steps", self.dense_steps)
        if not callable(self.dither):
            object.__setattr__(self, "dither", checked_dither("dither", self.dither))
        if not isinstance(self.track_agreement, bool):
            raise ValueError(f"MajorityVoteState: track_agreement: expected a bool, got {self.track_agreement!r}")
        _check_choice("backend", self.backend, BACKENDS)
        _check_integer("seed", self.seed)
        self._check_together()

    def _checked_warmup(self) -> int:
        if self.warmup_steps == "theory":
            if not isinstance(self.momentum, float):
                raise ValueError(
                    "MajorityVoteState: warmup_steps: expected a number with two momentum coefficients, got 'theory', "
                    "which is of one"
                )
            return signum_warmup_steps(self.momentum) if self.has_momentum else 0
        return _check_integer("warmup_steps", self.warmup_steps, " or 'theory'")

    def _check_together(self) -> None:
        """Options that would be without effect are refused: they say that something else is expected."""
        if self.warmup_steps and not self.has_momentum:
            raise ValueError(f"MajorityVoteState: warmup_steps: expected 0 without momentum, got {self.warmup_steps}")
        if self.abstains and self.zeros != "coin":
            raise ValueError(f"MajorityVoteState: zeros: expected the default with abstain, got {self.zeros!r}")
        if self.has_loss_scale and self.nonfinite == "ignore":
            raise ValueError(
                "MajorityVoteState: nonfinite: expected 'propagate' or 'raise' with a GradScaler, which looks for what "
                "is not finite, got 'ignore'"
            )
        if self.backend == "nccl" and self.topology == "server":
            raise ValueError(
                "MajorityVoteState: topology: expected 'sharded', 'allgather' or 'auto' with backend='nccl', got "
                "'server': that server counts messages one after another, in the memory of its host"
            )
        if self.can_be_zero and self.ties in ("positive", "negative"):
            raise ValueError(
                f"MajorityVoteState: ties: expected 'zero' or the default with abstain or a quorum, got {self.ties!r}"
            )

    @property
    def has_momentum(self) -> bool:
        return self.momentum != 0.0

    @property
    def abstains(self) -> bool:
        return self.abstain is not False

    @property
    def threshold(self) -> Threshold | None:
        if isinstance(self.abstain, bool):
            return Threshold(0.0, is_relative=False) if self.abstain else None
        if isinstance(self.abstain, str):
            return Threshold(float(self.abstain.removeprefix(RELATIVE)), is_relative=True)
        return Threshold(self.abstain, is_relative=False)

    @property
    def can_be_zero(self) -> bool:
        """Whether the vote of a coordinate has three results."""
        return self.abstains or self.ties == "zero" or self.quorum != 1 or isinstance(self.quorum, float)

    @property
    def votes_on_device(self) -> bool:
        """Whether messages are exchanged between CUDA devices, and voted on there."""
        return self.backend == "nccl"

    @property
    def has_loss_scale(self) -> bool:
        return self.scale == LOSS_SCALE

    def votes_to_lead(self, all_votes: int) -> int:
        """The quorum: by how many of all votes one sign must lead."""
        if isinstance(self.quorum, int):
            return self.quorum
        return max(1, math.ceil(Fraction(self.quorum).limit_denominator(10**6) * all_votes))

    def phase(self, step: int) -> Phase:
        """Of a step, the first of which is 1."""
        if step <= self.dense_steps:
            return Phase.DENSE
        return Phase.WARMUP if step <= int(self.warmup_steps) else Phase.VOTE

    def coefficients(self, phase: Phase, loss_scale: float = 1.0) -> Coefficients:
        """``(a, b, c, d)``: send sign(a·m + b·g), keep m ← c·m + d·g.

        One number β is Signum (Bernstein et al. 2018, Algorithm 2: a = c = β, b = d = 1 - β); two are the Lion rule
        (Chen et al. 2023: send with β1, keep with β2). In the warm-up the gradient is sent (Theorem 3). Momentum is
        that of the gradient before it was multiplied by ``loss_scale``.
        """
        send, keep = self.momentum if isinstance(self.momentum, tuple) else (self.momentum, self.momentum)
        if phase is Phase.WARMUP:
            send = 0.0
        elif phase is Phase.DENSE:
            send = keep  # nothing is sent
        return send, (1.0 - send) / loss_scale, keep, (1.0 - keep) / loss_scale

    def dither_at(self, step: int) -> float:
        """Standard deviation of the noise in a step, relative to the parameter's root mean square."""
        if callable(self.dither):
            return checked_dither(f"dither({step})", self.dither(step))
        return self.dither

    def as_dict(self) -> dict[str, Any]:
        """The value of every option."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def described(self) -> dict[str, Any]:
        """The same in words of JSON, to compare and to show."""
        return {**self.as_dict(), "dither": "a schedule" if callable(self.dither) else self.dither}


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"MajorityVoteState: {name}: expected one of {expected}, got {value!r}")


def _check_integer(name: str, value: object, otherwise: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(
            f"MajorityVoteState: {name}: expected an integer from 0 to 2**64 - 1{otherwise}, got {value!r}"
        )
    return value


def _number(value: object) -> float:
    """``value`` as a float, NaN if it is none."""
    if isinstance(value, bool | str):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _checked_momentum(momentum: object) -> float | tuple[float, float]:
    if isinstance(momentum, tuple | list):
        if len(momentum) == 2:
            send, keep = map(_number, momentum)
            if 0.0 <= send < 1.0 and 0.0 < keep < 1.0:
                return send, keep
    elif 0.0 <= (beta := _number(momentum)) < 1.0:
        return beta
    raise ValueError(
        "MajorityVoteState: momentum: expected a number in [0, 1), or two (send in [0, 1), keep in (0, 1)), "
        f"got {momentum!r}"
    )


def _checked_scale(scale: object) -> float | str:
    if isinstance(scale, str) and scale in (MEAN_ABS, LOSS_SCALE):
        return scale
    number = _number(scale)
    if not (math.isfinite(number) and number > 0.0):
        raise ValueError(
            f"MajorityVoteState: scale: expected a finite number above 0, 'mean_abs' or a GradScaler, got {scale!r}"
        )
    return number


def _checked_abstain(abstain: object) -> bool | float | str:
    if isinstance(abstain, bool):
        return abstain
    is_relative = isinstance(abstain, str) and abstain.startswith(RELATIVE)
    try:
        value = float(abstain.removeprefix(RELATIVE)) if isinstance(abstain, str) and is_relative else _number(abstain)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(
            f"MajorityVoteState: abstain: expected a bool, a finite number above 0, or '{RELATIVE}' and such a number, "
            f"got {abstain!r}"
        )
    return f"{RELATIVE}{value}" if is_relative else value


def _checked_quorum(quorum: object) -> int | float:
    if isinstance(quorum, int) and not isinstance(quorum, bool) and 1 <= quorum < 2**31:
        return quorum
    if isinstance(quorum, float) and 0.0 < quorum <= 1.0:
        return quorum
    raise ValueError(
        "MajorityVoteState: quorum: expected an integer from 1 to 2**31 - 1 (votes), or a float above 0 and up to 1.0 "
        f"(share of all votes), got {quorum!r}"
    )


def checked_dither(name: str, dither: object) -> float:
    number = _number(dither)
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(
            f"MajorityVoteState: {name}: expected a finite number from 0 on, or for dither a function of the step that "
            f"returns one, got {dither!r}"
        )
    return number
