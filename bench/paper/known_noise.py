"""How often a vote is wrong whose noise is known: Lemma D.1, Theorem 2(b), and the skewed noise of Remark 3.

Part of votes.py. Votes are packed and counted by signvote's own kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import common
from signvote import majority_vote, pack_signs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float32]

WORKERS = (1, 2, 3, 7, 8, 15, 31, 63)
ODD = tuple(workers for workers in WORKERS if workers % 2 == 1)
SEED = 0
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
ERRORS = 4.0  # standard errors that a measured rate may lie above a bound or off the exact one
TRIALS = 2**18  # a multiple of 32
RATIOS = (0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0)
SHOWN = (0.1, 0.5, 1.0, 2.0)  # in the table
BATCHES = (1, 5, 10, 30)


@dataclass(frozen=True)
class Noise:
    """With mean 0 and standard deviation 1, unimodal and symmetric."""

    name: str
    draw: Callable[[np.random.Generator, tuple[int, int]], Floats]
    tail: Callable[[float], float]  # how likely it is above this number


def _uniform(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return (2 * math.sqrt(3) * (rng.random(shape, np.float32) - 0.5)).astype(np.float32)


def _laplace(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return (rng.exponential(math.sqrt(0.5), shape) * rng.choice((-1.0, 1.0), shape)).astype(np.float32)


NOISES = (
    Noise("Gaussian", lambda rng, shape: rng.standard_normal(shape, np.float32), lambda s: NormalDist().cdf(-s)),
    Noise("uniform", _uniform, lambda s: max(0.0, 0.5 - s / (2 * math.sqrt(3)))),
    Noise("Laplace", _laplace, lambda s: 0.5 * math.exp(-math.sqrt(2) * s)),
)


@dataclass(frozen=True)
class Rate:
    """How often the vote on one coordinate is wrong: measured, computed, and at most by the paper."""

    noise: str
    ratio: float  # signal to noise
    workers: int
    trials: int
    measured: float
    exact: float
    bound: float | None

    @property
    def error(self) -> float:
        """The standard error of `measured`."""
        return math.sqrt(max(self.exact * (1 - self.exact), 1 / self.trials) / self.trials)


def wrong_votes(words: NDArray[np.uint32], seed: int) -> int:
    """In how many coordinates, whose true sign is positive, the majority of the rows is negative."""
    vote = majority_vote(words, seed=seed)
    return int(np.unpackbits(vote.view(np.uint8)).size - np.unpackbits(vote.view(np.uint8)).sum())


def binomial_tail(workers: int, q: float) -> float:
    """How likely a vote is wrong if each worker is with probability q; a tie is decided by a coin."""
    terms = [math.comb(workers, k) * q**k * (1 - q) ** (workers - k) for k in range(workers + 1)]
    tie = 0.5 * terms[workers // 2] if workers % 2 == 0 else 0.0
    return sum(terms[workers // 2 + 1 :]) + tie


def lemma_d1(ratio: float) -> float:
    """The most that a single sign is wrong under unimodal symmetric noise."""
    return 2 / (9 * ratio**2) if ratio > 2 / math.sqrt(3) else 0.5 - ratio / (2 * math.sqrt(3))


def theorem_2b(ratio: float, workers: int) -> float:
    """The inequality that Theorem 2(b) rests on: a vote is wrong with probability at most 1 / (sqrt(M) S)."""
    return min(1.0, 1 / (math.sqrt(workers) * ratio))


def known_noise(trials: int) -> list[Rate]:
    rates = []
    for place, noise in enumerate(NOISES):
        drawn = noise.draw(np.random.default_rng((SEED, place)), (WORKERS[-1], trials))
        for ratio in RATIOS:
            words = np.stack([pack_signs(row + np.float32(ratio), seed=m) for m, row in enumerate(drawn)])
            for workers in WORKERS:
                rates.append(
                    Rate(
                        noise.name,
                        ratio,
                        workers,
                        trials,
                        wrong_votes(words[:workers], SEED) / trials,
                        binomial_tail(workers, noise.tail(ratio)),
                        lemma_d1(ratio) if workers == 1 else theorem_2b(ratio, workers),
                    )
                )
    return rates


def skewed_noise(trials: int) -> list[Rate]:
    """The distribution of section 4, Remark 3, averaged over batches before the vote."""
    rates = []
    for batch in BATCHES:
        rng = np.random.default_rng((SEED, batch, 3))
        fifties = rng.binomial(batch, 0.1, (WORKERS[-1], trials))
        words = np.stack([pack_signs((51.0 * row - batch).astype(np.float32)) for row in fifties])
        # The mean is negative where 51 k < n, for k values of 50 among n.
        few = range(math.ceil(batch / 51))
        q = sum(math.comb(batch, k) * 0.1**k * 0.9 ** (batch - k) for k in few)
        for workers in WORKERS:
            measured = wrong_votes(words[:workers], SEED) / trials
            ratio = 4.1 / 15.3 * math.sqrt(batch)
            rates.append(
                Rate(f"two values, batch {batch}", ratio, workers, trials, measured, binomial_tail(workers, q), None)
            )
    return rates


def known_text(rates: Sequence[Rate], trials: int) -> str:
    by_place = {(one.noise, one.ratio, one.workers): one for one in rates}
    rows = [
        [
            f"{noise.name}, S = {ratio:g}",
            *(f"{by_place[noise.name, ratio, workers].measured:.4f}" for workers in ODD),
            f"{lemma_d1(ratio):.4f}",
            f"{theorem_2b(ratio, ODD[-1]):.4f}",
        ]
        for noise in NOISES
        for ratio in SHOWN
    ]
    off = [one for one in rates if abs(one.measured - one.exact) > ERRORS * one.error]
    above = [one for one in rates if one.bound is not None and one.measured - ERRORS * one.error > one.bound]
    tight = max((one for one in rates if one.bound is not None and one.workers > 1), key=_of_bound)
    even = common.listed([workers for workers in WORKERS if workers not in ODD])
    lines = [
        f"Of {len(rates)} rates (also of {even} workers, where a coin decides ties), {len(off)} differ from the "
        f"binomial distribution's by more than {ERRORS:g} standard errors, and {len(above)} are above their bound by "
        "more than that.",
        "Uniform noise meets Lemma D.1 with equality up to S = 2/√3 = 1.155: there the lemma cannot be improved."
        if _equal(rates)
        else "",
        f"The bound of Theorem 2(b) is not tight: the closest vote of two or more workers is wrong "
        f"{_of_bound(tight):.2f} times as often as the bound allows ({tight.noise}, S = {tight.ratio:g}, "
        f"{tight.workers} workers).",
    ]
    if above:
        lines.append("This contradicts the paper.")
    header = ["noise", *(f"M = {workers}" for workers in ODD), "Lemma D.1", f"1/(√M S), M = {ODD[-1]}"]
    return "\n".join(
        [
            f"**Known noise.** Part of {trials:,} votes by `pack_signs` and `majority_vote` that miss the sign of a "
            f"gradient of S = |g|/{SIGMA} (seed {SEED}; standard errors up to {0.5 / math.sqrt(trials):.4f}). Lemma "
            "D.1 bounds the first column, 1/(√M S) the last one.",
            "",
            common.table(header, rows),
            "",
            " ".join(line for line in lines if line),
        ]
    )


def _of_bound(one: Rate) -> float:
    return one.measured / one.bound if one.bound else 0.0


def _equal(rates: Sequence[Rate]) -> bool:
    """Whether single signs under uniform noise are as often wrong as Lemma D.1 allows, where it is linear."""
    some = [one for one in rates if (one.noise, one.workers) == ("uniform", 1) and one.ratio < 2 / math.sqrt(3)]
    return all(one.bound is not None and abs(one.measured - one.bound) < ERRORS * one.error for one in some)


def skewed_text(rates: Sequence[Rate]) -> str:
    by_batch: dict[str, list[Rate]] = {}
    for one in rates:
        if one.workers in ODD:
            by_batch.setdefault(one.noise, []).append(one)
    rows = [[name, *(f"{one.measured:.4f}" for one in some)] for name, some in by_batch.items()]
    hurt = [name.split()[-1] for name, some in by_batch.items() if some[-1].measured > some[0].measured]
    helped = [name.split()[-1] for name, some in by_batch.items() if some[-1].measured < some[0].measured]
    verdict = f"More workers hurt at batch {common.listed(hurt)}" if hurt else "More workers hurt at no batch"
    verdict += f" and help at batch {common.listed(helped)}." if helped else " and help at none."
    if "1" in hurt and helped:
        verdict += " Both are what the remark says: averaging a batch makes the noise symmetric enough."
    return "\n".join(
        [
            "**Skewed noise.** The same for the gradient of section 4, Remark 3, 50 with probability 0.1 and otherwise "
            "-1, averaged over a batch before the sign is taken:",
            "",
            common.table(["", *(f"M = {workers}" for workers in ODD)], rows),
            "",
            verdict,
        ]
    )


def draw_known(panels: Sequence[Axes], rates: Sequence[Rate]) -> None:
    """A panel for each kind of noise."""
    for noise, axes in zip(NOISES, panels, strict=True):
        for colour, workers in enumerate((1, 3, 15, 63)):
            some = [one for one in rates if (one.noise, one.workers) == (noise.name, workers) and one.measured > 0]
            ratios = np.geomspace(RATIOS[0], RATIOS[-1], 100)
            bound = [lemma_d1(s) if workers == 1 else theorem_2b(s, workers) for s in ratios]
            label = f"M = {workers}"
            axes.plot([one.ratio for one in some], [one.measured for one in some], "o", color=f"C{colour}", label=label)
            axes.plot(ratios, [binomial_tail(workers, noise.tail(s)) for s in ratios], color=f"C{colour}", linewidth=1)
            axes.plot(ratios, bound, "--", color=f"C{colour}", linewidth=1)
        axes.set(
            xlabel="signal to noise S", ylabel="votes that are wrong", xscale="log", yscale="log", ylim=(1e-5, 1.5)
        )
        axes.set_title(f"{noise.name}: measured, exact (line), bound (dashed)", fontsize="medium")


def draw_skewed(axes: Axes, rates: Sequence[Rate]) -> None:
    for name in dict.fromkeys(one.noise for one in rates):
        some = [one for one in rates if one.noise == name and one.workers % 2 == 1]
        axes.plot([one.workers for one in some], [one.measured for one in some], "o-", label=name)
    axes.set(xlabel="workers M", ylabel="votes that are wrong", xscale="log")
    axes.set_title("section 4, Remark 3", fontsize="medium")
