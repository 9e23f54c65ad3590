"""The statistics of the gradient of each coordinate over micro-batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from signvote.arguments import to_integer
from signvote.diagnostics.gradients import check_gradient, named_gradients
from signvote.diagnostics.moments import Moments
from signvote.diagnostics.summary import GradientSummary, summarize


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
        self._moments: dict[str, Moments] = {}
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
        found = named_gradients(op, gradients)
        for name, gradient in found.items():
            check_gradient(f"{op}: the gradient of {name!r}", gradient)
        if self._moments:
            shapes = {name: tuple(moments.mean.shape) for name, moments in self._moments.items()}
            _check_same_shapes(f"{op}: gradients", {name: tuple(g.shape) for name, g in found.items()}, shapes)
        else:
            self._kept = {coordinate: [] for coordinate in self._choose(found)}
            self._moments = {
                name: Moments.none(gradient.shape, self._device or gradient.device, self._shape)
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

    def _measured(self, what: str, least: int, shape: bool = False) -> dict[str, Moments]:
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
        return {n: m.standard_deviation() for n, m in self._measured("standard_deviation", 2).items()}

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
        return {name: moments.skewness() for name, moments in self._measured("skewness", 3, shape=True).items()}

    @property
    def excess_kurtosis(self) -> dict[str, Tensor]:
        r"""The kurtosis of each coordinate above that of a Gaussian, without its bias for one:
        :math:`G_2 = ((n + 1) g_2 + 6) (n - 1) / ((n - 2) (n - 3))`. NaN without noise.
        """
        return {n: m.excess_kurtosis() for n, m in self._measured("excess_kurtosis", 4, shape=True).items()}

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
        return {name: moments.bimodality() for name, moments in measured.items()}

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
        if not any(moments.mean.numel() for moments in parts):
            raise ValueError("GradientStatistics.summary: no coordinates, expected one or more")
        return summarize(parts, self._shape)

    def by_parameter(self) -> dict[str, GradientSummary]:
        """The :meth:`summary` of each parameter that has coordinates."""
        return {name: self.summary(name) for name, moments in self._moments.items() if moments.mean.numel()}


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
