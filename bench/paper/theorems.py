"""Theorems 1, 2 and 3 on quadratics with known curvature and noise: mean |g|_1 and its bounds.

Learning rates and batches are the theorems' own. N, their number of gradient calls, is the square of the steps K.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import common
from signvote import majority_vote, pack_signs, unpack_signs
from signvote.optim import signum_warmup_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

DIMENSIONS = 100
REPEATS = 50
SEED = 0
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
STEPS = (30, 100, 300, 1000, 3000, 10000)  # K
STEPS_VOTED = (30, 100, 300, 1000)
STEPS_MOMENTUM = (100, 300, 1000, 3000, 10000)
WORKERS = (3, 15)
MOMENTA = (0.5, 0.9)
LARGE = 30.0  # standard deviation
FIT_FROM = 300  # steps: the exponents are fitted from here on

_EVEN = np.ones(DIMENSIONS)
_UNEVEN = np.geomspace(0.01, 1.0, DIMENSIONS)


@dataclass(frozen=True)
class Problem:
    """f(x) = sum of L_i x_i^2 / 2, and the standard deviation of one call of its gradient oracle."""

    name: str
    curvature: Array
    deviation: Array
    skewed: bool = False  # noise of two values, those of section 4, Remark 3; Gaussian otherwise

    def objective(self, x: Array) -> float:
        """The mean over the rows of x."""
        return 0.5 * float(np.square(x).mean(axis=0) @ self.curvature)

    def noise(self, rng: np.random.Generator, shape: tuple[int, ...], calls: int) -> Array:
        """The error of the mean of so many calls of the oracle, for points of this shape."""
        if not self.skewed:
            return self.deviation / math.sqrt(calls) * rng.standard_normal(shape)
        # 50 with probability 0.1, otherwise -1: mean 4.1, standard deviation 15.3.
        mean = 51.0 * rng.binomial(calls, 0.1, shape) / calls - 1.0
        return self.deviation * (mean - 4.1) / 15.3


PROBLEMS = (
    Problem("dense", _EVEN, _EVEN),
    Problem("noisy", _EVEN, LARGE * _EVEN),
    Problem("uneven", _UNEVEN, _UNEVEN[::-1].copy()),
    Problem("noisy and skewed", _EVEN, LARGE * _EVEN, skewed=True),
)


@dataclass(frozen=True)
class Run:
    """Some runs of so many steps: mean |g|_1 of each repeat, and the theorem's bound on its expectation."""

    theorem: str
    problem: str
    workers: int
    momentum: float
    steps: int
    measured: list[float]
    bound: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.measured))


def start(repeats: int) -> Array:
    """The same point for all repeats."""
    return np.tile(np.random.default_rng(SEED).standard_normal(DIMENSIONS), (repeats, 1))


def theorem_1_or_2(problem: Problem, steps: int, workers: int, repeats: int) -> Run:
    """Algorithm 1, or Algorithm 3 for several workers, with the learning rate and the batch of Theorems 1 and 2."""
    rng = np.random.default_rng((SEED, steps, workers))
    x = start(repeats)
    l1 = float(problem.curvature.sum())
    rate, calls = 1 / math.sqrt(l1 * steps), steps
    bound = math.sqrt(l1) * (problem.objective(x) + 0.5)
    # Theorem 2(b) is for symmetric and unimodal noise; 2(a), for any noise, has the bound of Theorem 1.
    bound += 2 * float(problem.deviation.sum()) / (1.0 if problem.skewed else math.sqrt(workers))
    total = np.zeros(repeats)
    for _ in range(steps):
        gradient = problem.curvature * x
        total += np.abs(gradient).sum(axis=1)
        if workers == 1:
            x -= rate * np.sign(gradient + problem.noise(rng, x.shape, calls))
        else:
            x -= rate * vote(gradient + problem.noise(rng, (workers, *x.shape), calls))
    theorem = "1" if workers == 1 else "2(a)" if problem.skewed else "2(b)"
    return Run(theorem, problem.name, workers, 0.0, steps, (total / steps).tolist(), bound / math.sqrt(steps))


def vote(gradients: Array) -> Array:
    """The majority's signs of the workers' gradients, which are the rows."""
    words = np.stack([pack_signs(gradient.ravel()) for gradient in gradients])
    signs: Array = unpack_signs(majority_vote(words), gradients[0].size, dtype=np.float64)
    return signs.reshape(gradients[0].shape)


def theorem_3(problem: Problem, steps: int, beta: float, repeats: int) -> Run:
    """Algorithm 2 with the learning rates, batches and warm-up of Theorem 3.

    The theorem leaves its constants out. The bound is that of Lemma E.1, with the rate of Lemma F.2 and the measured
    objective at the end of the warm-up: the last line of the proof before constants are dropped.
    """
    rng = np.random.default_rng((SEED, steps, round(1000 * beta)))
    x, momentum, warmup = start(repeats), np.zeros((repeats, DIMENSIONS)), signum_warmup_steps(beta)
    l1, s1 = float(problem.curvature.sum()), float(problem.deviation.sum())
    delta = 1 / math.sqrt(l1)
    total, at_warm = np.zeros(repeats), 0.0
    for k in range(steps):
        gradient = problem.curvature * x
        if k == warmup:
            at_warm = problem.objective(x)
        if k >= warmup:
            total += np.abs(gradient).sum(axis=1)
        noisy = gradient + problem.noise(rng, x.shape, k + 1)
        momentum = beta * momentum + (1 - beta) * noisy
        x -= delta / math.sqrt(k + 1) * np.sign(noisy if k < warmup else momentum)
    rates = delta / np.sqrt(np.arange(warmup, steps) + 1)
    errors = 2 * (8 * l1 * delta * beta / (1 - beta) + math.sqrt(3 * (1 - beta)) * s1) * rates / delta
    bound = (at_warm + 2 * (rates * errors).sum() + (rates**2).sum() * l1 / 2) / ((steps - warmup) * rates[-1])
    measured = (total / (steps - warmup)).tolist()
    return Run("3", problem.name, 1, beta, steps, measured, float(bound))


def run(quick: bool) -> common.Result:
    repeats = 5 if quick else REPEATS
    few = 2 if quick else None
    runs = [theorem_1_or_2(problem, steps, 1, repeats) for problem in PROBLEMS for steps in STEPS[:few]]
    runs += [
        theorem_1_or_2(problem, steps, workers, repeats)
        for problem in PROBLEMS
        for workers in WORKERS
        for steps in STEPS_VOTED[:few]
    ]
    runs += [
        theorem_3(problem, steps, beta, repeats)
        for problem in PROBLEMS
        for beta in MOMENTA
        for steps in STEPS_MOMENTUM[:few]
    ]
    curves: dict[tuple[str, str, int, float], list[Run]] = {}
    for one in runs:
        curves.setdefault((one.theorem, one.problem, one.workers, one.momentum), []).append(one)
    return common.Result(
        name="theorems",
        title="Theorems 1, 2 and 3: the bounds on a quadratic",
        markdown=_markdown(list(curves.values()), repeats),
        figure=_plot(list(curves.values())),
        data={
            "dimensions": DIMENSIONS,
            "repeats": repeats,
            "seed": SEED,
            "warmup_steps": {str(beta): signum_warmup_steps(beta) for beta in MOMENTA},
            "runs": [asdict(one) for one in runs],
        },
    )


def exponent(curve: Sequence[Run]) -> float | None:
    """The power of the number of steps that mean |g|_1 follows, fitted to the longer runs."""
    long = [one for one in curve if one.steps >= FIT_FROM]
    if len(long) < 2:
        return None
    return float(np.polyfit(np.log([one.steps for one in long]), np.log([one.mean for one in long]), 1)[0])


def _markdown(curves: Sequence[Sequence[Run]], repeats: int) -> str:
    rows = []
    for curve in curves:
        first, last, fitted = curve[0], curve[-1], exponent(curve)
        ratios = [one.mean / one.bound for one in curve]
        rows.append(
            [
                f"{first.theorem}, {first.problem}",
                f"{first.workers}",
                f"{first.momentum:g}",
                f"{last.steps}",
                common.spread(last.measured, 2),
                f"{last.bound:.2f}",
                f"{min(ratios):.3f} to {max(ratios):.3f}",
                "" if fitted is None else f"{fitted:.2f}",
            ]
        )
    header = ["theorem, problem", "M", "β", "largest K", "mean ‖g‖₁", "bound", "mean / bound, all K", "power of K"]
    warmups = ", ".join(f"C({beta:g}) = {signum_warmup_steps(beta)}" for beta in MOMENTA)
    return "\n".join(
        [
            f"f(x) = ½ Σ Lᵢxᵢ² in {DIMENSIONS} dimensions, from one Gaussian starting point; mean ‖g‖₁ over "
            f"the K steps of a run ({repeats} repeats, seed {SEED}, ± their standard deviation), and the bound on "
            f"its expectation. Noise is Gaussian. *dense*: Lᵢ = {SIGMA}ᵢ = 1; *noisy*: Lᵢ = 1, {SIGMA}ᵢ = {LARGE:g}; "
            f"*uneven*: Lᵢ from 0.01 to 1, {SIGMA}ᵢ from 1 to 0.01; *noisy and skewed*: as *noisy*, with the two "
            "values of section 4, Remark 3.",
            "",
            "Learning rates and batches are the theorems' own. Theorems 1 and 2: rate 1/√(‖L‖₁K), batch K, bound "
            f"[√‖L‖₁ (f₀ - f* + ½) + 2‖{SIGMA}‖₁/√M]/√K, the square root of the theorem's for N = K²; M = 1 in Theorem "
            "1, and in the bound of Theorem 2(a), which is for any noise. Workers vote by `pack_signs` and "
            f"`majority_vote`. Theorem 3: rate 1/√(‖L‖₁(k + 1)), batch k + 1, warm-up {warmups}; it leaves its "
            "constants out, so the bound is that of Lemma E.1 with Lemma F.2; the gradients of the warm-up do not "
            "count.",
            "",
            common.table(header, rows),
            "",
            _verdict(curves),
        ]
    )


def _verdict(curves: Sequence[Sequence[Run]]) -> str:
    runs = [one for curve in curves for one in curve]
    broken = [one for one in runs if one.mean > one.bound]
    if broken:
        worst = max(broken, key=lambda one: one.mean / one.bound)
        lines = [
            f"{len(broken)} of {len(runs)} means are above their bound: this contradicts the paper. The worst is "
            f"{worst.mean / worst.bound:.2f} times its bound, in Theorem {worst.theorem} ({worst.problem}, "
            f"{worst.steps} steps)."
        ]
    else:
        lines = [f"All {len(runs)} means are below their bounds, as they must be."]
    slopes = [slope for curve in curves if (slope := exponent(curve)) is not None]
    if slopes:
        lines.append(
            f"From {FIT_FROM} steps on the mean falls as K to a power from {max(slopes):.2f} to {min(slopes):.2f}; the "
            "bounds fall as K to the power -0.5, that of Theorem 3 but for a logarithm."
        )
    one_worker = {(one.problem, one.steps): one.mean for one in runs if one.theorem == "1"}
    steps, most = max(one.steps for one in runs if one.workers > 1), max(one.workers for one in runs)
    voted = {one.problem: one.mean for one in runs if (one.workers, one.steps) == (most, steps)}
    gains = ", ".join(f"{mean / one_worker[name, steps]:.2f} ({name})" for name, mean in voted.items())
    lines.append(f"With {most} workers the mean after {steps} steps is that of one worker times {gains}.")
    return " ".join(lines)


def _plot(curves: Sequence[Sequence[Run]]) -> Figure:
    figure = common.new_figure(12, 7)
    panels = figure.subplots(2, len(PROBLEMS) // 2)
    for axes, problem in zip(panels.flat, PROBLEMS, strict=True):
        some = [curve for curve in curves if curve[0].problem == problem.name]
        for colour, curve in enumerate(some):
            first = curve[0]
            label = f"Theorem {first.theorem}"
            if first.workers > 1:
                label += f", M = {first.workers}"
            if first.momentum > 0:
                label += f", β = {first.momentum:g}"
            steps = [one.steps for one in curve]
            axes.plot(steps, [one.mean for one in curve], ".-", color=f"C{colour}", label=label)
            axes.plot(steps, [one.bound for one in curve], "--", color=f"C{colour}", linewidth=1)
        axes.set(xlabel="steps K", ylabel="mean ‖g‖₁", xscale="log", yscale="log", title=problem.name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.suptitle("measured (points) and bounds (dashed)", fontsize="medium")
    return figure


if __name__ == "__main__":
    sys.exit(common.main(run, __doc__))
