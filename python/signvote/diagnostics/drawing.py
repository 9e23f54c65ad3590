"""Plots of the statistics of a gradient, and of the votes on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from signvote.diagnostics.gradient_statistics import GradientStatistics
from signvote.diagnostics.moments import BIMODAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
