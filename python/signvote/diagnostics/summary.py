"""What the moments of the gradient's coordinates say of a parameter, or of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from signvote.diagnostics.densities import density_of_parts
from signvote.diagnostics.moments import BIMODAL, Moments

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class GradientSummary:
    r"""What :class:`GradientStatistics` has found, over a parameter or over all of them.

    Quantiles are dictionaries from 0.05, 0.25, 0.5, 0.75 and 0.95 to the value that so large a part of the coordinates
    does not exceed. Coordinates whose gradient was the same in all micro-batches have no noise, and are left out of the
    quantiles (``noiseless`` counts them). With fewer than four micro-batches, with ``shape=False``, or where no
    coordinate has noise, what is not there is None.

    Attributes:
        micro_batches: How many gradients the statistics have seen.
        coordinates: How many coordinates there are.
        noiseless: How many of them have a standard deviation of 0.
        gradient_density: :math:`\phi(g)`, equation (1), of the mean gradient.
        noise_density: :math:`\phi(\sigma)` of the vector of standard deviations.
        noise_share: How much of the mean gradient is noise: :math:`\|\sigma\|_2^2 / (n \|\hat g\|_2^2)` for ``n``
            micro-batches and their mean :math:`\hat g`. It estimates the part of :math:`\|\hat g\|_2^2` that the error
            of the mean makes up. Where it is not small, ``gradient_density`` is as much the density of the noise as
            that of the gradient: use more micro-batches. If the micro-batches are a full pass over the data, the mean
            is exact whatever this says.
        signal_to_noise: Quantiles of :math:`S_i = |g_i| / \sigma_i` (section 4 of the paper), of one micro-batch.
        absolute_skewness: Quantiles of the absolute value of :attr:`GradientStatistics.skewness`.
        bimodality: Quantiles of :attr:`GradientStatistics.bimodality`.
        bimodal: Which part of the coordinates with noise has a bimodality above :data:`BIMODAL`.
    """

    micro_batches: int
    coordinates: int
    noiseless: int
    gradient_density: float
    noise_density: float
    noise_share: float
    signal_to_noise: dict[float, float] | None
    absolute_skewness: dict[float, float] | None
    bimodality: dict[float, float] | None
    bimodal: float | None

    @property
    def density_ratio(self) -> float:
        r""":math:`R_2 = \phi(\sigma) / \phi(g)` (section 3.3): how much denser the noise is than the gradient.

        Well above 1 it speaks for SGD, unless it does so only because the gradient is hard to see (``noise_share``).
        NaN if neither has a coordinate other than 0, infinity if only the gradient has none.
        """
        return _ratio(self.noise_density, self.gradient_density)

    @property
    def curvature_ratio_limit(self) -> float:
        r"""The most that :math:`R_1 = \sqrt{\phi(L)} / \phi(g)` (section 3.3) can be: :math:`1 / \phi(g)`.

        The density of the curvature :math:`L` cannot be measured from gradients, but no density is above 1.
        """
        return _ratio(1.0, self.gradient_density)

    def cases(self, much: float = 10.0) -> str:
        r"""Which of the cases of section 3.3 it can be: ``"I or III"``, ``"II"`` or ``"II or III"``.

        In case I the paper's comparison of bounds suggests SGD, in case II that signSGD converges as fast or faster,
        in case III it says nothing. Bounds are compared here, not what they bound.

        - ``"I or III"``: :math:`R_2 \gg 1`, noise much denser than the gradient. The unknown :math:`R_1` decides.
        - ``"II"``: neither :math:`R_2` nor even the largest possible :math:`R_1` is much above 1.
        - ``"II or III"``: :math:`R_2` is not, and :math:`R_1` may be.

        Args:
            much: From what ratio on one thing is much greater than another: the paper does not say.

        Raises:
            ValueError: ``much`` is not above 1.
        """
        if not much > 1:
            raise ValueError(f"cases: much is {much!r}, expected a number above 1")
        if self.density_ratio >= much:
            return "I or III"
        return "II or III" if self.curvature_ratio_limit >= much else "II"

    def __str__(self) -> str:
        lines = [
            f"{self.micro_batches} micro-batches, {self.coordinates:,} coordinates, {self.noiseless:,} without noise",
            f"density of gradient {self.gradient_density:.3g}, of noise {self.noise_density:.3g}, "
            f"ratio R2 {self.density_ratio:.3g}; R1 at most {self.curvature_ratio_limit:.3g}",
            f"noise in the mean gradient: {100 * self.noise_share:.3g} % of its squared norm",
        ]
        for label, quantiles in (
            ("signal to noise", self.signal_to_noise),
            ("|skewness|", self.absolute_skewness),
            ("bimodality", self.bimodality),
        ):
            if quantiles is not None:
                cells = ", ".join(f"{value:.3g} ({100 * q:g} %)" for q, value in quantiles.items())
                lines.append(f"{label}: {cells}")
        if self.bimodal is not None:
            lines.append(f"bimodality above that of a uniform distribution: {100 * self.bimodal:.3g} % of coordinates")
        return "\n".join(lines)


def summarize(parts: Sequence[Moments], shape: bool) -> GradientSummary:
    """The summary of all coordinates of the parts, of which there is at least one."""
    coordinates = sum(moments.mean.numel() for moments in parts)
    count = parts[0].count
    deviations = [moments.standard_deviation() for moments in parts]
    noisy = [moments.m2 > 0 for moments in parts]
    ratios = [m.mean.abs()[some] / deviation[some] for m, deviation, some in zip(parts, deviations, noisy, strict=True)]
    shaped = shape and count >= 4
    skewness = [m.skewness()[some].abs() for m, some in zip(parts, noisy, strict=True)] if shaped else []
    bimodality = [m.bimodality()[some] for m, some in zip(parts, noisy, strict=True)] if shaped else []
    number_noisy = sum(int(some.sum()) for some in noisy)
    above = sum(int((part > BIMODAL).sum()) for part in bimodality)
    return GradientSummary(
        micro_batches=count,
        coordinates=coordinates,
        noiseless=coordinates - number_noisy,
        gradient_density=density_of_parts([moments.mean for moments in parts]),
        noise_density=density_of_parts(deviations),
        noise_share=_ratio(
            sum(float(deviation.square().sum()) for deviation in deviations) / count,
            sum(float(moments.mean.square().sum()) for moments in parts),
        ),
        signal_to_noise=_quantiles(ratios),
        absolute_skewness=_quantiles(skewness),
        bimodality=_quantiles(bimodality),
        bimodal=above / number_noisy if shaped and number_noisy else None,
    )


def _quantiles(parts: Sequence[Tensor]) -> dict[float, float] | None:
    values = np.concatenate([part.reshape(-1).cpu().numpy() for part in parts]) if parts else np.empty(0)
    if values.size == 0:
        return None
    # Of what there is, nothing between two values: some may be infinite.
    found = np.quantile(values, QUANTILES, method="inverted_cdf")
    return dict(zip(QUANTILES, map(float, found), strict=True))


def _ratio(above: float, below: float) -> float:
    if below == 0.0:
        return math.nan if above == 0.0 else math.inf
    return above / below
