"""Measurements that tell whether a network suits sign methods: density, noise, and the shape of the noise.

Equations and sections are those of Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems" (ICML
2018). The mean and the moments about it are updated in one pass: mean and variance as in Welford, "Note on a method for
calculating corrected sums of squares and products" (Technometrics 1962), which the paper uses as well; third and fourth
moment, and the merging of two statistics, as in Pébay, "Formulas for robust, one-pass parallel computation of
covariances and arbitrary-order statistical moments" (Sandia report SAND2008-6212, 2008).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from signvote.arguments import DTYPES, TORCH_DTYPES, AnyArray, to_integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BIMODAL", "GradientStatistics", "GradientSummary", "VoteRecord", "density", "draw"]

BIMODAL = 5 / 9
"""The bimodality coefficient of a uniform distribution."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def density(v: AnyArray) -> float:
    r"""The density of a vector, equation (1) of the paper:

    .. math::
        \phi(v) = \frac{\|v\|_1^2}{d \, \|v\|_2^2}

    It is 1 where all :math:`d` coordinates have the same magnitude and :math:`1/d` where a single one is not 0. A
    large vector of independent Gaussian coordinates has :math:`2/\pi`. Neither scale, signs nor order matter.

    Args:
        v: Array or tensor of float32, float64, float16 or bfloat16, of any shape. Computed in float64.

    Returns:
        A number from :math:`1/d` to 1; 0.0, which no other vector has, where all coordinates are 0.

    Raises:
        TypeError: ``v`` is not an array or a tensor, or has another dtype.
        ValueError: ``v`` is empty, or has NaN or infinity.
    """
    if isinstance(v, np.ndarray) and v.dtype.name in TORCH_DTYPES.values():
        v = torch.from_numpy(v.astype(np.float64, order="C"))
    if isinstance(v, np.ndarray):
        raise TypeError(f"density: v is {v.dtype}, expected {DTYPES}")
    if not isinstance(v, Tensor):
        raise TypeError(f"density: v is a {type(v).__name__}, expected a NumPy array or a torch tensor")
    _check_gradient("density: v", v)
    if v.numel() == 0:
        raise ValueError("density: v has no coordinates, expected one or more")
    return _density([v.detach().to(torch.float64)])


def _check_gradient(what: str, x: Tensor) -> None:
    if x.dtype not in TORCH_DTYPES:
        raise TypeError(f"{what} is {x.dtype}, expected {DTYPES}")
    if x.layout is not torch.strided:
        raise ValueError(f"{what} has layout {x.layout}, expected a dense tensor")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{what} has NaN or infinity, expected finite coordinates")


def _density(parts: Sequence[Tensor]) -> float:
    """The density of the concatenated float64 tensors."""
    top = max(float(part.abs().max()) for part in parts if part.numel())
    if top == 0.0:
        return 0.0
    l1 = sum(float((part / top).abs().sum()) for part in parts)
    l2_squared = sum(float((part / top).square().sum()) for part in parts)
    return min(1.0, l1 * l1 / (sum(part.numel() for part in parts) * l2_squared))


@dataclass
class _Moments:
    """The mean of ``count`` values of each coordinate, and the sums of the powers of their distances from it."""

    count: int
    mean: Tensor
    m2: Tensor
    m3: Tensor | None
    m4: Tensor | None

    @classmethod
    def none(cls, size: torch.Size, device: torch.device, shape: bool) -> _Moments:
        def zeros() -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        return cls(0, zeros(), zeros(), zeros() if shape else None, zeros() if shape else None)

    def copy(self, device: torch.device) -> _Moments:
        def copied(x: Tensor) -> Tensor:
            return x.to(device, copy=True)

        m3, m4 = (None if x is None else copied(x) for x in (self.m3, self.m4))
        return _Moments(self.count, copied(self.mean), copied(self.m2), m3, m4)

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

    def merge(self, other: _Moments) -> None:
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


def _ratio(above: float, below: float) -> float:
    if below == 0.0:
        return math.nan if above == 0.0 else math.inf
    return above / below


class GradientStatistics:
    r"""Mean, standard deviation and shape of the gradient of each coordinate, over micro-batches, in one pass.

    Hold the parameters fixed, run ``backward()`` on one micro-batch after another, all of the same size, and give each
    gradient to :meth:`update`. A full pass over the data gives the exact gradient and noise, as in Figure 1 of the
    paper; fewer micro-batches give estimates (see :attr:`GradientSummary.noise_share`).

    All sums are in float64. That takes 32 bytes for each coordinate on the gradient's device, 16 with ``shape=False``.

    Args:
        shape: Whether to keep the third and fourth moment, for skewness and bimodality.
        keep: Of which coordinates to keep all values, for histograms of their noise as in Figure 2: how many, chosen at
            random among all, or a dictionary from names to indices in the flattened gradient.
        seed: Of that choice.
        device: Where to keep the sums, ``"cpu"`` for example; None for the device of each gradient.

    Raises:
        TypeError: ``keep`` or ``seed`` is of another type.
        ValueError: ``keep`` is negative.

    Example::

        statistics = GradientStatistics()
        for inputs, targets in loader:
            model.zero_grad()
            loss_fn(model(inputs), targets).backward()
            statistics.update(model.named_parameters())
        print(statistics.summary())
        draw(statistics).savefig("gradients.png")
    """

    def __init__(
        self,
        *,
        shape: bool = True,
        keep: int | Mapping[str, Sequence[int]] = 6,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        op = "GradientStatistics"
        self._shape = bool(shape)
        self._keep: int | list[tuple[str, int]]
        if isinstance(keep, Mapping):
            self._keep = [
                (str(name), index)
                for name, indices in keep.items()
                for index in dict.fromkeys(to_integer(op, f"keep[{name!r}]", i, 0, 2**63 - 1) for i in indices)
            ]
        else:
            self._keep = to_integer(op, "keep", keep, 0, 2**31 - 1)
        self._seed = to_integer(op, "seed", seed, 0, 2**64 - 1)
        self._device = None if device is None else torch.device(device)
        self._moments: dict[str, _Moments] = {}
        self._kept: dict[tuple[str, int], list[float]] = {}

    def __repr__(self) -> str:
        return f"<GradientStatistics of {self.count} micro-batches, {len(self._moments)} parameters>"

    @property
    def count(self) -> int:
        """How many gradients have been given."""
        return next(iter(self._moments.values())).count if self._moments else 0

    @property
    def names(self) -> list[str]:
        """The parameters, in the order in which they were given."""
        return list(self._moments)

    def update(self, gradients: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]) -> None:
        """Take the gradient of one micro-batch.

        Set the gradients to None or 0 before each ``backward()``: they add up otherwise.

        Under :func:`~signvote.ddp.majority_vote_hook` ``.grad`` holds the vote. For the gradient of this worker, run
        forward and backward within ``ddp.no_sync()``, or on ``ddp.module``.

        Args:
            gradients: One of

                - ``model.named_parameters()``: the ``.grad`` of each one that requires a gradient. Where it is None,
                  because this micro-batch did not use the parameter, it is 0;
                - ``model.parameters()``: the same, and their names are their places in it, from ``"0"``;
                - a dictionary from names to gradients.

        Raises:
            TypeError: ``gradients`` is none of these, or a gradient is not of float32, float64, float16 or bfloat16.
            ValueError: There is no gradient, one is sparse or has NaN or infinity, or names and shapes are not those of
                the first call. Nothing has been taken then.
        """
        op = "GradientStatistics.update"
        found = _named_gradients(op, gradients)
        for name, gradient in found.items():
            _check_gradient(f"{op}: the gradient of {name!r}", gradient)
        if self._moments:
            shapes = {name: tuple(moments.mean.shape) for name, moments in self._moments.items()}
            _check_same_shapes(f"{op}: gradients", {name: tuple(g.shape) for name, g in found.items()}, shapes)
        else:
            self._kept = {coordinate: [] for coordinate in self._choose(found)}
            self._moments = {
                name: _Moments.none(gradient.shape, self._device or gradient.device, self._shape)
                for name, gradient in found.items()
            }
        with torch.no_grad():
            for name, moments in self._moments.items():
                moments.add(found[name].to(device=moments.mean.device, dtype=torch.float64))
            for (name, index), values in self._kept.items():
                values.append(float(found[name].reshape(-1)[index]))

    def _choose(self, gradients: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        if isinstance(self._keep, list):
            for name, index in self._keep:
                if name not in gradients:
                    raise ValueError(f"GradientStatistics: keep names {name!r}, expected one of {', '.join(gradients)}")
                if index >= gradients[name].numel():
                    raise ValueError(
                        f"GradientStatistics: keep[{name!r}] has index {index}, "
                        f"expected one below {gradients[name].numel()}"
                    )
            return self._keep
        names, ends = list(gradients), list(accumulate(gradient.numel() for gradient in gradients.values()))
        chosen = sorted(random.Random(self._seed).sample(range(ends[-1]), min(self._keep, ends[-1])))
        coordinates = []
        for flat in chosen:
            place = next(i for i, end in enumerate(ends) if flat < end)
            coordinates.append((names[place], flat - ends[place] + gradients[names[place]].numel()))
        return coordinates

    def merge(self, other: GradientStatistics) -> None:
        """Add what ``other`` has seen, another worker's for example, as if :meth:`update` had been given all of it.

        Up to the order of the kept values, and to rounding in float64.

        Raises:
            TypeError: ``other`` is not a GradientStatistics.
            ValueError: ``other`` is this one, or differs in ``shape``, names, shapes or kept coordinates.
        """
        op = "GradientStatistics.merge"
        if not isinstance(other, GradientStatistics):
            raise TypeError(f"{op}: other is a {type(other).__name__}, expected a GradientStatistics")
        if other is self:
            raise ValueError(f"{op}: other is this one itself, expected another")
        if other._shape is not self._shape:
            raise ValueError(f"{op}: other has shape={other._shape}, expected shape={self._shape}")
        if other.count == 0:
            return
        if self.count == 0:
            coordinates = self._choose({name: moments.mean for name, moments in other._moments.items()})
            _check_same_keep(op, coordinates, list(other._kept))
            self._kept = {coordinate: list(values) for coordinate, values in other._kept.items()}
            self._moments = {n: m.copy(self._device or m.mean.device) for n, m in other._moments.items()}
            return
        shapes = {name: tuple(moments.mean.shape) for name, moments in self._moments.items()}
        _check_same_shapes(f"{op}: other", {n: tuple(m.mean.shape) for n, m in other._moments.items()}, shapes)
        _check_same_keep(op, list(self._kept), list(other._kept))
        for name, moments in self._moments.items():
            moments.merge(other._moments[name])
        for coordinate, values in self._kept.items():
            values += other._kept[coordinate]

    def _measured(self, what: str, least: int, shape: bool = False) -> dict[str, _Moments]:
        """The moments, if there are enough gradients for ``what``."""
        if shape and not self._shape:
            raise ValueError(f"GradientStatistics.{what} needs shape=True")
        if self.count < least:
            raise ValueError(f"GradientStatistics.{what}: {self.count} gradients seen, expected {least} or more")
        return self._moments

    @property
    def mean(self) -> dict[str, Tensor]:
        """The mean gradient of each parameter, float64: the paper's g."""
        return {name: moments.mean.clone() for name, moments in self._measured("mean", 1).items()}

    @property
    def standard_deviation(self) -> dict[str, Tensor]:
        r"""The standard deviation of each coordinate over micro-batches, float64: the paper's :math:`\sigma`.

        The sum of squares is divided by one less than their number.
        """
        return {n: (m.m2 / (m.count - 1)).sqrt() for n, m in self._measured("standard_deviation", 2).items()}

    @property
    def signal_to_noise(self) -> dict[str, Tensor]:
        r""":math:`S_i = |g_i| / \sigma_i` of each coordinate (section 4). NaN where both are 0."""
        deviation = self.standard_deviation
        return {name: moments.mean.abs() / deviation[name] for name, moments in self._moments.items()}

    @property
    def skewness(self) -> dict[str, Tensor]:
        r"""The skewness of each coordinate, 0 for a symmetric distribution, without its bias for a Gaussian:
        :math:`G_1 = g_1 \sqrt{n (n - 1)} / (n - 2)`. NaN without noise.

        With Gaussian noise it spreads by about :math:`\sqrt{6/n}` around 0.
        """
        return {name: _skewness(moments) for name, moments in self._measured("skewness", 3, shape=True).items()}

    @property
    def excess_kurtosis(self) -> dict[str, Tensor]:
        r"""The kurtosis of each coordinate above that of a Gaussian, without its bias for one:
        :math:`G_2 = ((n + 1) g_2 + 6) (n - 1) / ((n - 2) (n - 3))`. NaN without noise.
        """
        return {n: _excess_kurtosis(m) for n, m in self._measured("excess_kurtosis", 4, shape=True).items()}

    @property
    def bimodality(self) -> dict[str, Tensor]:
        r"""Sarle's bimodality coefficient of each coordinate, as in Pfister et al., "Good things peak in pairs: a note
        on the bimodality coefficient" (Frontiers in Psychology 2013):

        .. math::
            \frac{G_1^2 + 1}{G_2 + 3 (n - 1)^2 / ((n - 2) (n - 3))}

        About 1/3 for a Gaussian, 5/9 (:data:`BIMODAL`) for a uniform distribution, 1 for one of two values; NaN
        without noise. Above 5/9 a distribution is likely to have two modes or to be very skewed. In either case the
        assumption of Theorem 2(b), that noise is unimodal and symmetric, does not hold, and more workers may not help
        (section 4, Remark 3). A small coefficient proves nothing: heavy tails make it small.
        """
        measured = self._measured("bimodality", 4, shape=True)
        return {name: _bimodality(moments) for name, moments in measured.items()}

    @property
    def noise(self) -> dict[tuple[str, int], NDArray[np.float64]]:
        """Of each kept coordinate, named by parameter and index, the values less their mean."""
        self._measured("noise", 1)
        arrays = {coordinate: np.array(values) for coordinate, values in self._kept.items()}
        return {coordinate: values - values.mean() for coordinate, values in arrays.items()}

    def noise_histogram(self, name: str, index: int, bins: int = 20) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The histogram of a kept coordinate's noise: counts, and the edges of the bins.

        Raises:
            KeyError: The coordinate was not kept.
        """
        noise = self.noise
        if (name, index) not in noise:
            raise KeyError(f"coordinate {index} of {name!r} was not kept; these were: {list(noise)}")
        counts, edges = np.histogram(noise[name, index], bins=bins)
        return counts, edges

    def summary(self, name: str | None = None) -> GradientSummary:
        """Densities, signal to noise and shape of the noise: over all parameters, or over the one named.

        Raises:
            KeyError: There is no parameter of that name.
            ValueError: Fewer than two gradients have been seen, or there are no coordinates.
        """
        measured = self._measured("summary", 2)
        if name is not None and name not in measured:
            raise KeyError(f"no parameter is named {name!r}; these are: {', '.join(measured)}")
        parts = list(measured.values()) if name is None else [measured[name]]
        coordinates = sum(moments.mean.numel() for moments in parts)
        if coordinates == 0:
            raise ValueError("GradientStatistics.summary: no coordinates, expected one or more")
        count = self.count
        deviations = [(moments.m2 / (count - 1)).sqrt() for moments in parts]
        noisy = [moments.m2 > 0 for moments in parts]
        ratios = [
            m.mean.abs()[some] / deviation[some] for m, deviation, some in zip(parts, deviations, noisy, strict=True)
        ]
        shaped = self._shape and count >= 4
        skewness = [_skewness(m)[some].abs() for m, some in zip(parts, noisy, strict=True)] if shaped else []
        bimodality = [_bimodality(m)[some] for m, some in zip(parts, noisy, strict=True)] if shaped else []
        number_noisy = sum(int(some.sum()) for some in noisy)
        above = sum(int((part > BIMODAL).sum()) for part in bimodality)
        return GradientSummary(
            micro_batches=count,
            coordinates=coordinates,
            noiseless=coordinates - number_noisy,
            gradient_density=_density([moments.mean for moments in parts]),
            noise_density=_density(deviations),
            noise_share=_ratio(
                sum(float(deviation.square().sum()) for deviation in deviations) / count,
                sum(float(moments.mean.square().sum()) for moments in parts),
            ),
            signal_to_noise=_quantiles(ratios),
            absolute_skewness=_quantiles(skewness),
            bimodality=_quantiles(bimodality),
            bimodal=above / number_noisy if shaped and number_noisy else None,
        )

    def by_parameter(self) -> dict[str, GradientSummary]:
        """The :meth:`summary` of each parameter that has coordinates."""
        return {name: self.summary(name) for name, moments in self._moments.items() if moments.mean.numel()}


def _named_gradients(op: str, gradients: Any) -> dict[str, Tensor]:
    expected = "model.named_parameters(), model.parameters() or a dictionary from names to gradients"
    if isinstance(gradients, (Tensor, torch.nn.Module)) or not isinstance(gradients, Iterable):
        raise TypeError(f"{op}: gradients is a {type(gradients).__name__}, expected {expected}")
    found: dict[str, Tensor] = {}
    if isinstance(gradients, Mapping):
        for name, gradient in gradients.items():
            if not isinstance(gradient, Tensor) or isinstance(gradient, torch.nn.Parameter):
                raise TypeError(
                    f"{op}: gradients[{name!r}] is a {type(gradient).__name__}, expected a gradient, a Tensor"
                )
            found[str(name)] = gradient.detach()
    else:
        missing = True
        for place, item in enumerate(gradients):
            name, parameter = item if isinstance(item, tuple) and len(item) == 2 else (str(place), item)
            if not isinstance(parameter, Tensor):
                raise TypeError(f"{op}: item {place} of gradients is a {type(item).__name__}, expected {expected}")
            if name in found:
                raise ValueError(f"{op}: two parameters are named {name!r}, expected different names")
            if parameter.requires_grad:
                missing = missing and parameter.grad is None
                found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
        if found and missing:
            raise ValueError(f"{op}: no parameter has a gradient, expected a call after backward()")
    if not found:
        raise ValueError(f"{op}: gradients has no parameter that requires a gradient, expected {expected}")
    if not any(gradient.numel() for gradient in found.values()):
        raise ValueError(f"{op}: gradients has no coordinates, expected one or more")
    return found


def _check_same_shapes(what: str, got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in expected.keys() - got.keys():
        raise ValueError(f"{what} has no {name!r}, expected the names of the first call")
    for name, shape in got.items():
        if name not in expected:
            raise ValueError(f"{what} has {name!r}, expected the names of the first call")
        if shape != expected[name]:
            raise ValueError(f"{what} has shape {shape} for {name!r}, expected {expected[name]}")


def _check_same_keep(op: str, expected: list[tuple[str, int]], got: list[tuple[str, int]]) -> None:
    if got != expected:
        raise ValueError(f"{op}: other keeps the coordinates {got}, expected {expected}")


def _skewness(moments: _Moments) -> Tensor:
    assert moments.m3 is not None
    n = moments.count
    return math.sqrt(n) * moments.m3 / moments.m2**1.5 * (math.sqrt(n * (n - 1)) / (n - 2))


def _excess_kurtosis(moments: _Moments) -> Tensor:
    assert moments.m4 is not None
    n = moments.count
    excess = n * moments.m4 / moments.m2**2 - 3
    return ((n + 1) * excess + 6) * ((n - 1) / ((n - 2) * (n - 3)))


def _bimodality(moments: _Moments) -> Tensor:
    n = moments.count
    return (_skewness(moments).square() + 1) / (_excess_kurtosis(moments) + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3)))


def _quantiles(parts: Sequence[Tensor]) -> dict[float, float] | None:
    values = np.concatenate([part.reshape(-1).cpu().numpy() for part in parts]) if parts else np.empty(0)
    if values.size == 0:
        return None
    # Of what there is, nothing between two values: some may be infinite.
    found = np.quantile(values, QUANTILES, method="inverted_cdf")
    return dict(zip(QUANTILES, map(float, found), strict=True))


class VoteRecord(Protocol):
    """How the workers voted on a parameter: ``state.stats(per_parameter=True)`` has one for each."""

    @property
    def agreement(self) -> float:
        """Which part of the votes was cast for the side that won, 0 to 1."""

    @property
    def margin(self) -> float:
        """By how much it won: the difference of both sides as a part of all votes, 0 to 1."""


def draw(statistics: GradientStatistics, votes: Mapping[str, VoteRecord] | None = None) -> Figure:
    """Draw everything: densities of each parameter, signal to noise, shape and histograms of the noise, and the votes.

    Args:
        statistics: Of four or more gradients.
        votes: Agreement and margin of each parameter, as in ``state.stats(per_parameter=True)``.

    Returns:
        A matplotlib figure; ``draw(statistics).savefig("gradients.png")`` writes it.

    Raises:
        ImportError: matplotlib is missing: ``pip install 'signvote[bench]'``.
        TypeError: ``statistics`` is not a GradientStatistics.
        ValueError: Fewer than four gradients have been seen, or agreement or margin is not from 0 to 1.
    """
    if not isinstance(statistics, GradientStatistics):
        raise TypeError(f"draw: statistics is a {type(statistics).__name__}, expected a GradientStatistics")
    statistics._measured("draw", 4)
    for name, record in (votes or {}).items():
        for field, value in (("agreement", record.agreement), ("margin", record.margin)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"draw: votes[{name!r}].{field} is {value!r}, expected a number from 0 to 1")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("signvote.diagnostics.draw needs matplotlib: pip install 'signvote[bench]'") from error

    noise = statistics.noise
    panels = 2 if statistics._shape else 1
    rows = 1 + bool(votes) + 1 + math.ceil(len(noise) / 3)
    figure = Figure(figsize=(12, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, 6)
    summaries = statistics.by_parameter()
    _draw_by_parameter(
        figure.add_subplot(grid[0, :]),
        list(summaries),
        {
            "gradient": [one.gradient_density for one in summaries.values()],
            "noise": [one.noise_density for one in summaries.values()],
        },
        "density",
    )
    if votes:
        lines = {
            "agreement": [record.agreement for record in votes.values()],
            "margin": [record.margin for record in votes.values()],
        }
        _draw_by_parameter(figure.add_subplot(grid[1, :]), list(votes), lines, "votes")
    row = 1 + bool(votes)
    _draw_ratios(figure.add_subplot(grid[row, : 6 // panels]), statistics)
    if statistics._shape:
        _draw_shapes(figure.add_subplot(grid[row, 3:]), statistics)
    for place, ((name, index), values) in enumerate(noise.items()):
        column = 2 * (place % 3)
        axes = figure.add_subplot(grid[row + 1 + place // 3, column : column + 2])
        _draw_noise(axes, values, f"{name}[{index}]")
    whole = statistics.summary()
    figure.suptitle(
        f"{whole.micro_batches} micro-batches, {whole.coordinates:,} coordinates: density of the gradient "
        f"{whole.gradient_density:.3g}, of the noise {whole.noise_density:.3g}, ratio {whole.density_ratio:.3g}"
    )
    return figure


def _draw_by_parameter(axes: Axes, names: Sequence[str], lines: Mapping[str, Sequence[float]], label: str) -> None:
    for line, values in lines.items():
        axes.plot(range(len(names)), values, ".-", label=line)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="xx-small")
    axes.set(ylabel=label, ylim=(0.0, 1.02))
    axes.legend()
    axes.grid(alpha=0.3)


def _values(tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.concatenate([tensor.reshape(-1).cpu().numpy() for tensor in tensors.values()])
    return values[np.isfinite(values)]


def _draw_ratios(axes: Axes, statistics: GradientStatistics) -> None:
    values = _values(statistics.signal_to_noise)
    values = values[values > 0]
    if values.size:
        axes.hist(np.log10(values), bins=60, weights=np.full(values.size, 100 / values.size))
    axes.set(xlabel="log10 of signal to noise, |mean| / standard deviation", ylabel="% of coordinates")
    axes.grid(alpha=0.3)


def _draw_shapes(axes: Axes, statistics: GradientStatistics) -> None:
    for label, values in (("skewness", _values(statistics.skewness)), ("bimodality", _values(statistics.bimodality))):
        if values.size:
            inside = np.clip(values, -4.0, 4.0)
            axes.hist(
                inside,
                bins=np.linspace(-4.0, 4.0, 81).tolist(),
                weights=np.full(values.size, 100 / values.size),
                alpha=0.6,
                label=label,
            )
    axes.axvline(BIMODAL, color="black", linestyle=":", label="bimodality of a uniform distribution")
    axes.set(xlabel="skewness (ends: ±4 and beyond), bimodality", ylabel="% of coordinates")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def _draw_noise(axes: Axes, noise: NDArray[np.float64], title: str) -> None:
    axes.hist(noise, bins=min(40, max(10, noise.size // 8)), density=bool(noise.any()))
    deviation = float(noise.std())
    if deviation > 0:
        x = np.linspace(noise.min(), noise.max(), 200)
        gaussian = np.exp(-0.5 * (x / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
        axes.plot(x, gaussian, color="black", linewidth=1, label="Gaussian of the same deviation")
    axes.set_title(title, fontsize="small")
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=5)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axes.grid(alpha=0.3)
