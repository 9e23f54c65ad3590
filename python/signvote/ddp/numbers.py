"""Numbers that travel with a vote: each rank sends its own, and every rank learns their mean over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float32]


@dataclass(frozen=True)
class NumbersLayout:
    """Which numbers the messages of a bucket carry, and in what order.

    Attributes:
        progress: sᵀg of the step before, over all buckets: 1 number in the first bucket's messages.
        loss_scale: Of the GradScaler: 1 number.
        magnitudes: Mean absolute gradient, one number for each voted parameter.
        agreements: In the step before, how far the rank's own votes agreed with the outcome: two for each voted
            parameter.
    """

    progress: int = 0
    loss_scale: int = 0
    magnitudes: int = 0
    agreements: int = 0

    @property
    def size(self) -> int:
        return self.progress + self.loss_scale + self.magnitudes + self.agreements

    def split(self, numbers: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """Views of ``(..., size)`` numbers: progress, loss scale, magnitudes, agreements."""
        ends = np.cumsum([self.progress, self.loss_scale, self.magnitudes])
        progress, loss_scale, magnitudes, agreements = np.split(numbers, ends, axis=-1)
        return progress, loss_scale, magnitudes, agreements


def mean(numbers: Numbers, weights: npt.NDArray[np.int64]) -> Numbers:
    """Over ranks, one to a row of ``numbers``, each as often as its weight says; the same bits wherever computed."""
    total = np.zeros(numbers.shape[1], np.float64)
    for row, weight in zip(numbers, weights.tolist(), strict=True):
        total += row * np.float64(weight)
    return (total / weights.sum()).astype(np.float32)
