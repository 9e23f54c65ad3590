"""Figure A.1: a quadratic with noise on one coordinate of 100, SGD at its best rate against signSGD."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIMENSIONS = 100
NOISE = 100.0  # standard deviation, on the first coordinate
REPEATS = 50
# The paper says neither how many steps nor which rates it tried; it found 0.001 best for SGD, 0.01 for signSGD.
STEPS = (300, 1000, 3000, 10000)
RATES = (*(float(f"{m}e{e}") for e in range(-5, 0) for m in (1, 2, 5)), 1.0)
DECADES = tuple(float(f"1e{e}") for e in range(-5, 1))
PAPER = {"SGD": 1e-3, "signSGD": 1e-2}
TUNING_SEED, SEED = 0, 1
QUARTILES = (0.25, 0.75)


@dataclass(frozen=True)
class Tuned:
    """A method after `steps` steps at the rate that was best for so many, of `rates`."""

    method: str
    steps: int
    rate: float
    best_decade: float
    final: list[float]  # one for each repeat, of other seeds than the rate was chosen by


def objectives(method: str, rates: Sequence[float], steps: int, repeats: int, seed: int) -> NDArray[np.float64]:
    """f(x) = |x|^2 / 2 before the first step and after each: (steps + 1, rates, repeats).

    All rates see the same starting points and the same noise.
    """
    rng = np.random.default_rng(seed)
    x = np.repeat(rng.standard_normal((1, repeats, DIMENSIONS)), len(rates), axis=0)
    rate = np.array(rates)[:, None, None]
    found = np.empty((steps + 1, len(rates), repeats))
    found[0] = 0.5 * np.square(x).sum(axis=-1)
    for step in range(steps):
        gradient = x.copy()
        gradient[..., 0] += NOISE * rng.standard_normal(repeats)
        x -= rate * (gradient if method == "SGD" else np.sign(gradient))
        found[step + 1] = 0.5 * np.square(x).sum(axis=-1)
    return found


def tune(method: str, checkpoints: Sequence[int], repeats: int) -> list[Tuned]:
    with np.errstate(over="ignore", invalid="ignore"):
        tuning = objectives(method, RATES, checkpoints[-1], repeats, TUNING_SEED).mean(axis=2)
    best = [_lowest(tuning[steps], RATES) for steps in checkpoints]
    decades = [_lowest(tuning[steps][[RATES.index(rate) for rate in DECADES]], DECADES) for steps in checkpoints]
    rates = list(dict.fromkeys(best))
    curves = objectives(method, rates, checkpoints[-1], repeats, SEED)
    return [
        Tuned(method, steps, rate, decade, curves[steps, rates.index(rate)].tolist())
        for steps, rate, decade in zip(checkpoints, best, decades, strict=True)
    ]


def _lowest(values: NDArray[np.float64], rates: Sequence[float]) -> float:
    return rates[int(np.nanargmin(values))]


def run(quick: bool) -> common.Result:
    checkpoints, repeats = ((100, 300), 5) if quick else (STEPS, REPEATS)
    tuned = {method: tune(method, checkpoints, repeats) for method in PAPER}
    curves = {m: objectives(m, [rate], checkpoints[-1], repeats, SEED)[:, 0] for m, rate in PAPER.items()}
    rows = []
    for sgd, sign in zip(tuned["SGD"], tuned["signSGD"], strict=True):
        cells = [f"{sgd.steps}"]
        for one in (sgd, sign):
            cells += [f"{one.rate:g}", f"{one.best_decade:g}", common.spread(one.final, 2)]
        rows.append([*cells, f"{np.mean(sgd.final) / np.mean(sign.final):.1f}"])
    header = [
        "steps",
        *(f"{m}: {c}" for m in PAPER for c in ("best rate", "best decade", "objective")),
        "SGD / signSGD",
    ]
    lines = [
        f"f(x) = ½‖x‖² in {DIMENSIONS} dimensions, x₀ from a standard Gaussian, gradient noise of standard deviation "
        f"{NOISE:g} on the first coordinate only. Best constant rate for each number of steps, of {len(RATES)} from "
        f"{RATES[0]:g} to {RATES[-1]:g}, chosen by the mean objective of {repeats} repeats (seed {TUNING_SEED}) and "
        f"measured on {repeats} others (seed {SEED}): mean ± standard deviation of the repeats.",
        "",
        common.table(header, rows),
        "",
        _verdict(tuned["SGD"], tuned["signSGD"]),
    ]
    return common.Result(
        name="figure_a1",
        title="Figure A.1: sparse noise",
        markdown="\n".join(lines),
        figure=_plot(curves, tuned),
        data=_data(tuned, curves, repeats),
    )


def _verdict(sgd: Sequence[Tuned], sign: Sequence[Tuned]) -> str:
    ahead = [b.steps for a, b in zip(sgd, sign, strict=True) if np.mean(b.final) < np.mean(a.final)]
    steps = [one.steps for one in sgd]
    if ahead == steps:
        finding = "signSGD ends lower at every number of steps, as in the paper."
    elif ahead:
        behind = common.listed([one for one in steps if one not in ahead])
        finding = f"signSGD ends lower after {common.listed(ahead)} steps, as in the paper, but not after {behind}."
    else:
        finding = "SGD ends as low or lower at every number of steps: this does not confirm the paper."
    agreeing = [
        a.steps
        for a, b in zip(sgd, sign, strict=True)
        if (a.best_decade, b.best_decade) == (PAPER["SGD"], PAPER["signSGD"])
    ]
    rates = f"{PAPER['SGD']:g} for SGD and {PAPER['signSGD']:g} for signSGD"
    if agreeing:
        best = common.listed(agreeing)
        return f"{finding} Of the powers of ten, {rates} are best after {best} steps, as the paper found."
    return f"{finding} The paper's best rates, {rates}, are the best powers of ten at none of these numbers of steps."


def _plot(curves: dict[str, NDArray[np.float64]], tuned: dict[str, list[Tuned]]) -> Figure:
    figure = common.new_figure(10, 4)
    over_steps, over_horizons = figure.subplots(1, 2)
    for method, curve in curves.items():
        mean, (low, high) = curve.mean(axis=1), np.quantile(curve, QUARTILES, axis=1)
        (line,) = over_steps.plot(mean, label=f"{method}, rate {PAPER[method]:g}", linewidth=1)
        over_steps.fill_between(range(len(mean)), low, high, color=line.get_color(), alpha=0.25)
        points = tuned[method]
        finals = np.array([one.final for one in points])
        low, high = np.quantile(finals, QUARTILES, axis=1)
        (line,) = over_horizons.plot([one.steps for one in points], finals.mean(axis=1), "o-", label=method)
        over_horizons.fill_between([one.steps for one in points], low, high, color=line.get_color(), alpha=0.25)
    over_steps.set(xlabel="step", ylabel="objective", yscale="log", xlim=(0, min(3000, len(mean) - 1)))
    over_steps.set_title("at the paper's rates", fontsize="medium")
    over_horizons.set(xlabel="steps", ylabel="objective at the end", xscale="log", yscale="log")
    over_horizons.set_title("at the best rate for each number of steps", fontsize="medium")
    for axes in (over_steps, over_horizons):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(f"mean of {finals.shape[1]} repeats, quartiles shaded", fontsize="medium")
    return figure


def _data(tuned: dict[str, list[Tuned]], curves: dict[str, NDArray[np.float64]], repeats: int) -> dict[str, Any]:
    return {
        "dimensions": DIMENSIONS,
        "noise": NOISE,
        "repeats": repeats,
        "rates": RATES,
        "seeds": {"tuning": TUNING_SEED, "measuring": SEED},
        "tuned": [vars(one) for ones in tuned.values() for one in ones],
        "at_the_papers_rates": {
            method: {"mean": curve[::50].mean(axis=1).tolist(), "deviation": curve[::50].std(axis=1, ddof=1).tolist()}
            for method, curve in curves.items()
        },
    }


if __name__ == "__main__":
    sys.exit(common.main(run, __doc__))
