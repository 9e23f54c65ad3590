"""Numbers that travel with a vote: each rank sends its own, and every rank learns their mean over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float32]

NO_NUMBERS: Numbers = np.zeros(0, np.float32)


@dataclass(frozen=True)
class NumbersLayout:
    """Which numbers the messages of a bucket carry, and in what order.

    Attributes:
        progress: Of the step before: sᵀg over all buckets, and the learning rate. In the first bucket's messages.
        magnitudes: Mean absolute gradient, one number for each voted parameter.
        agreements: In the step before, how far the rank's own votes agreed with the outcome: two for each voted
            parameter.
    """

    progress: int = 0
    magnitudes: int = 0
    agreements: int = 0

    @property
    def size(self) -> int:
        return self.progress + self.magnitudes + self.agreements

    def split(self, numbers: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Views of ``(..., size)`` numbers: progress, magnitudes, agreements."""
        progress, magnitudes, agreements = np.split(numbers, np.cumsum([self.progress, self.magnitudes]), axis=-1)
        return progress, magnitudes, agreements


def mean(numbers: Numbers, weights: npt.NDArray[np.int64]) -> Numbers:
    """Over ranks, one to a row of ``numbers``, each as often as its weight says; the same bits wherever computed."""
    total = np.zeros(numbers.shape[1], np.float64)
    for row, weight in zip(numbers, weights.tolist(), strict=True):
        total += row.astype(np.float64) * weight
    return (total / weights.sum()).astype(np.float32)
