"""The moments of each coordinate's distribution, updated in one pass.

Mean and variance as in Welford, "Note on a method for calculating corrected sums of squares and products"
(Technometrics 1962), which the paper uses as well; third and fourth moment, and the merging of two statistics, as in
Pébay, "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order statistical moments"
(Sandia report SAND2008-6212, 2008).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BIMODAL = 5 / 9
"""The bimodality coefficient of a uniform distribution."""


@dataclass
class Moments:
    """The mean of ``count`` values of each coordinate, and the sums of the powers of their distances from it."""

    count: int
    mean: Tensor
    m2: Tensor
    m3: Tensor | None
    m4: Tensor | None

    @classmethod
    def none(cls, size: torch.Size, device: torch.device, shape: bool) -> Moments:
        def zeros() -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        return cls(0, zeros(), zeros(), zeros() if shape else None, zeros() if shape else None)

    def copy(self, device: torch.device) -> Moments:
        def copied(x: Tensor) -> Tensor:
            return x.to(device, copy=True)

        m3, m4 = (None if x is None else copied(x) for x in (self.m3, self.m4))
        return Moments(self.count, copied(self.mean), copied(self.m2), m3, m4)

    def add(self, x: Tensor) -> None:
        """Welford's update, and Pébay's for the higher moments: what :meth:`merge` does with a single value."""
        n = self.count + 1
        delta = x - self.mean
        step = delta / n
        square = delta * step * self.count  # what m2 grows by
        if self.m3 is not None and self.m4 is not None:
            self.m4 += square * step * step * (n * n - 3 * n + 3) + 6 * step * step * self.m2 - 4 * step * self.m3
            self.m3 += square * step * (n - 2) - 3 * step * self.m2
        self.m2 += square
        self.mean += step
        self.count = n

    def merge(self, other: Moments) -> None:
        a, b = self.count, other.count
        n = a + b
        delta = other.mean.to(self.mean.device) - self.mean
        step = delta / n
        m2 = other.m2.to(delta.device)
        if self.m3 is not None and self.m4 is not None and other.m3 is not None and other.m4 is not None:
            m3, m4 = other.m3.to(delta.device), other.m4.to(delta.device)
            self.m4 += m4 + delta * step**3 * a * b * (a * a - a * b + b * b)
            self.m4 += 6 * step**2 * (a * a * m2 + b * b * self.m2) + 4 * step * (a * m3 - b * self.m3)
            self.m3 += m3 + delta * step**2 * a * b * (a - b) + 3 * step * (a * m2 - b * self.m2)
        self.m2 += m2 + delta * step * a * b
        self.mean += step * b
        self.count = n

    def standard_deviation(self) -> Tensor:
        return (self.m2 / (self.count - 1)).sqrt()

    def skewness(self) -> Tensor:
        assert self.m3 is not None
        n = self.count
        return math.sqrt(n) * self.m3 / self.m2**1.5 * (math.sqrt(n * (n - 1)) / (n - 2))

    def excess_kurtosis(self) -> Tensor:
        assert self.m4 is not None
        n = self.count
        excess = n * self.m4 / self.m2**2 - 3
        return ((n + 1) * excess + 6) * ((n - 1) / ((n - 2) * (n - 3)))

    def bimodality(self) -> Tensor:
        n = self.count
        return (self.skewness().square() + 1) / (self.excess_kurtosis() + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3)))
