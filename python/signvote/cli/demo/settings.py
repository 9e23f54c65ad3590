"""What one run of the demo trains, and how."""

from __future__ import annotations

from dataclasses import dataclass

SEQUENCES = 16  # for each worker in each step
CONTEXT = 64
WARMUP = 20


@dataclass(frozen=True)
class Settings:
    """The choices of the command line; the same on every worker."""

    workers: int
    steps: int
    topology: str
    momentum: float | tuple[float, float]
    lr: float
    seed: int
    compare: bool

    @property
    def methods(self) -> tuple[str, ...]:
        return ("vote", "adamw", "sgd") if self.compare else ("vote",)

    def schedule(self, step: int) -> float:
        """Learning rate at `step`, as a part of the top one: a short rise, then a straight line to zero."""
        return min(1.0, (step + 1) / WARMUP, (self.steps - step) / self.steps)
