"""The options of a vote: checked once, compared between ranks, pickled with the state."""

import math
from dataclasses import asdict, dataclass
from typing import Any

TOPOLOGIES = ("sharded", "allgather", "server", "auto")
UNDECIDED = ("coin", "positive", "negative")
NONFINITE = ("propagate", "raise", "ignore")


@dataclass(frozen=True)
class VoteOptions:
    """What every rank of a job must have in common. See :class:`signvote.ddp.MajorityVoteState` for the meanings."""

    momentum: float | tuple[float, float] = 0.9
    zeros: str = "coin"
    ties: str = "coin"
    scale: float = 1.0
    topology: str = "sharded"
    nonfinite: str = "propagate"
    seed: int = 0

    def __post_init__(self) -> None:
        # Stored as plain numbers, so that momentum=1/2 and momentum=numpy.float64(0.5) agree between ranks.
        object.__setattr__(self, "momentum", _checked_momentum(self.momentum))
        object.__setattr__(self, "scale", _checked_scale(self.scale))
        _check_choice("zeros", self.zeros, UNDECIDED)
        _check_choice("ties", self.ties, UNDECIDED)
        _check_choice("topology", self.topology, TOPOLOGIES)
        _check_choice("nonfinite", self.nonfinite, NONFINITE)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"MajorityVoteState: seed: expected an integer from 0 to 2**64 - 1, got {self.seed!r}")

    @property
    def has_momentum(self) -> bool:
        return self.momentum != 0.0

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """``(a, b, c, d)``: send sign(a·m + b·g), keep m ← c·m + d·g.

        One number β is Signum (Bernstein et al. 2018, Algorithm 2: a = c = β, b = d = 1 - β); two are the Lion rule
        (Chen et al. 2023: send with β1, keep with β2).
        """
        send, keep = self.momentum if isinstance(self.momentum, tuple) else (self.momentum, self.momentum)
        return send, 1.0 - send, keep, 1.0 - keep

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"MajorityVoteState: {name}: expected one of {expected}, got {value!r}")


def _checked_momentum(momentum: object) -> float | tuple[float, float]:
    try:
        if isinstance(momentum, tuple | list):
            send, keep = (float(beta) for beta in momentum)
            if 0.0 <= send < 1.0 and 0.0 < keep < 1.0:
                return send, keep
        else:
            beta = float(momentum)  # type: ignore[arg-type]
            if 0.0 <= beta < 1.0:
                return beta
    except (TypeError, ValueError):
        pass
    raise ValueError(
        "MajorityVoteState: momentum: expected a number in [0, 1), or two (send in [0, 1), keep in (0, 1)), "
        f"got {momentum!r}"
    )


def _checked_scale(scale: object) -> float:
    try:
        number = float(scale)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0.0):
        raise ValueError(f"MajorityVoteState: scale: expected a finite number above 0, got {scale!r}")
    return number
