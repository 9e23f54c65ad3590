"""Lemma D.1 and Theorem 2(b): how often a vote is wrong, against signal to noise and the number of workers.

First for noise that is known, then for the gradient of the demo's language model. Votes are packed and counted by
signvote's own kernels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

import common
from signvote import majority_vote, pack_signs
from signvote.cli.demo import data
from signvote.cli.demo.model import Transformer, loss
from signvote.cli.demo.settings import CONTEXT, SEQUENCES
from signvote.diagnostics import GradientStatistics
from signvote.optim import Signum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float32]

WORKERS = (1, 2, 3, 7, 8, 15, 31, 63)
SEED = 0
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
ERRORS = 4.0  # standard errors that a measured rate may lie above a bound or off the exact one

# -- Known noise ------------------------------------------------------------------------------------------------------

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


# -- A real gradient --------------------------------------------------------------------------------------------------

TRAINED = 200  # steps before the gradient is measured
PIECES = 4096  # the data set: what the exact gradient is over, and what workers draw from
BLOCKS = 12  # of as many workers as the largest vote has
ODD = tuple(workers for workers in WORKERS if workers % 2 == 1)
GAUSSIAN = 0.1  # signal to noise of the gradient that the classes are compared with
EDGES = tuple(2.0**e for e in range(-6, 1))  # of classes of signal to noise


@dataclass(frozen=True)
class Class:
    """Coordinates whose signal to noise lies between two edges."""

    low: float
    high: float
    coordinates: int
    ratio: float  # mean signal to noise
    wrong: list[float]  # part of the votes that is wrong, for each number of workers
    noise: list[float]  # that of a Gaussian gradient whose sign is as often wrong, by the noise of one worker
    exponent: float | None  # of the number of workers in `noise`


@dataclass(frozen=True)
class Network:
    """What `ODD` numbers of workers do to the gradient of a network at one point.

    Lists have a row for each number of workers, and rows of `vote` and `mean` a number for each block.
    """

    coordinates: int
    noiseless: int
    total_l1: float
    vote: list[list[float]]  # sum of |g_i| where the vote is wrong, by |g|_1
    mean: list[list[float]]  # the same for the sign of the mean gradient in full precision
    bound: list[float]  # |sigma|_1 / sqrt(M), by |g|_1
    classes: list[Class]
    hurt: float  # part of the coordinates that a single worker gets wrong more often than not
    hurt_l1: float  # their part of |g|_1


def network(blocks: int, trained: int, pieces: int) -> Network:
    torch.manual_seed(SEED)
    model, corpus = Transformer(context=CONTEXT), data.load_corpus()
    generator = torch.Generator().manual_seed(SEED)
    optimizer = Signum(model.parameters(), lr=2e-3, momentum=0.7, weight_decay=0.5)
    for _ in range(trained):
        gradient_of(model, data.sample(corpus.train, SEQUENCES, CONTEXT, generator))
        optimizer.step()
    every = data.every(corpus.train, pieces, CONTEXT)
    exact = np.zeros(sum(parameter.numel() for parameter in model.parameters()))
    for part in torch.split(every, 64):
        exact += gradient_of(model, part).astype(np.float64) * (len(part) / len(every))
    positive = exact > 0
    magnitude = np.abs(exact)

    statistics = GradientStatistics(shape=False, keep=0)
    shape = len(ODD), blocks
    wrong = {kind: np.zeros((len(ODD), exact.size), np.int32) for kind in ("vote", "mean")}
    mass = {kind: np.zeros(shape) for kind in ("vote", "mean")}
    for block in range(blocks):
        gradients = np.empty((ODD[-1], exact.size), np.float32)
        for row in gradients:
            chosen = torch.randint(len(every), (SEQUENCES,), generator=generator)
            row[:] = gradient_of(model, every[chosen])
            statistics.update({"all": torch.from_numpy(row)})
        # Coins for zeros are a worker's own.
        words = np.stack([pack_signs(row, seed=block * ODD[-1] + worker) for worker, row in enumerate(gradients)])
        for i, workers in enumerate(ODD):
            groups = range(0, ODD[-1] - workers + 1, workers)
            for first in groups:
                group = slice(first, first + workers)
                found = {
                    "vote": majority_vote(words[group]),
                    "mean": pack_signs(gradients[group].sum(axis=0), seed=block * ODD[-1] + first),
                }
                for kind, bits in found.items():
                    sign = np.unpackbits(bits.view(np.uint8), count=exact.size, bitorder="little")
                    missed = sign != positive
                    wrong[kind][i] += missed
                    mass[kind][i, block] += magnitude[missed].sum() / len(groups)
    deviation = statistics.standard_deviation["all"].numpy()
    noisy = (deviation > 0) & (magnitude > 0)
    votes = [blocks * (ODD[-1] // workers) for workers in ODD]
    l1 = float(magnitude.sum())
    alone = wrong["vote"][0] / votes[0]
    hurt = noisy & (alone > 0.5 + ERRORS * 0.5 / math.sqrt(votes[0]))
    return Network(
        coordinates=exact.size,
        noiseless=int((~noisy).sum()),
        total_l1=l1,
        vote=(mass["vote"] / l1).tolist(),
        mean=(mass["mean"] / l1).tolist(),
        bound=[float(deviation.sum() / l1 / math.sqrt(workers)) for workers in ODD],
        classes=_classes(magnitude[noisy] / deviation[noisy], wrong["vote"][:, noisy], votes),
        hurt=float(hurt.sum() / noisy.sum()),
        hurt_l1=float(magnitude[hurt].sum() / l1),
    )


def gradient_of(model: torch.nn.Module, pieces: torch.Tensor) -> Floats:
    model.zero_grad()
    loss(model, pieces).backward()  # type: ignore[no-untyped-call]
    return torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    ).numpy()


def _classes(ratios: NDArray[np.float64], wrong: NDArray[np.int32], votes: Sequence[int]) -> list[Class]:
    found = []
    for low, high in pairwise(EDGES):
        some = (ratios >= low) & (ratios < high)
        number, ratio = int(some.sum()), float(ratios[some].mean()) if some.any() else 0.0
        if number == 0:
            continue
        parts = [float(row[some].mean() / n) for row, n in zip(wrong, votes, strict=True)]
        noise = [noise_of(part, ratio) for part in parts]
        found.append(Class(low, high, number, ratio, parts, noise, exponent(noise)))
    return found


def noise_of(wrong: float, ratio: float) -> float:
    """The noise, by that of one worker, of a Gaussian gradient whose sign is as often wrong; NaN if there is none."""
    return ratio / -NormalDist().inv_cdf(wrong) if 0 < wrong < 0.5 else math.nan


def exponent(noise: Sequence[float]) -> float | None:
    """The power of the number of workers that the noise follows."""
    return float(np.polyfit(np.log(ODD), np.log(noise), 1)[0]) if all(map(math.isfinite, noise)) else None


# -- What a person reads ----------------------------------------------------------------------------------------------


def run(quick: bool) -> common.Result:
    trials = 2**12 if quick else TRIALS
    known, skewed = known_noise(trials), skewed_noise(trials)
    real = network(1, 2, 128) if quick else network(BLOCKS, TRAINED, PIECES)
    sections = [_known_text(known, trials), _skewed_text(skewed), _network_text(real, 128 if quick else PIECES)]
    return common.Result(
        name="votes",
        title="Lemma D.1 and Theorem 2(b): how often a vote is wrong",
        markdown="\n\n".join(sections),
        figure=_plot(known, skewed, real),
        data={
            "seed": SEED,
            "trials": trials,
            "workers": WORKERS,
            "known": [vars(one) for one in (*known, *skewed)],
            "network": _network_data(real),
        },
    )


def _known_text(rates: Sequence[Rate], trials: int) -> str:
    shown = [workers for workers in WORKERS if workers % 2 == 1]
    by_place = {(one.noise, one.ratio, one.workers): one for one in rates}
    rows = [
        [
            f"{noise.name}, S = {ratio:g}",
            *(f"{by_place[noise.name, ratio, workers].measured:.4f}" for workers in shown),
            f"{lemma_d1(ratio):.4f}",
            f"{theorem_2b(ratio, shown[-1]):.4f}",
        ]
        for noise in NOISES
        for ratio in SHOWN
    ]
    off = [one for one in rates if abs(one.measured - one.exact) > ERRORS * one.error]
    above = [one for one in rates if one.bound is not None and one.measured - ERRORS * one.error > one.bound]
    tight = max((one for one in rates if one.bound is not None and one.workers > 1), key=_of_bound)
    lines = [
        f"Of {len(rates)} rates (also of {_list([w for w in WORKERS if w not in shown])} workers, where a coin decides "
        f"ties), {len(off)} differ from the binomial distribution's by more than {ERRORS:g} standard errors, and "
        f"{len(above)} are above their bound by more than that.",
        "Uniform noise meets Lemma D.1 with equality up to S = 2/√3 = 1.155: there the lemma cannot be improved."
        if _equal(rates)
        else "",
        f"The bound of Theorem 2(b) is not tight: the closest vote of two or more workers is wrong "
        f"{_of_bound(tight):.2f} times as often as the bound allows ({tight.noise}, S = {tight.ratio:g}, "
        f"{tight.workers} workers).",
    ]
    if above:
        lines.append("This contradicts the paper.")
    header = ["noise", *(f"M = {workers}" for workers in shown), "Lemma D.1", f"1/(√M S), M = {shown[-1]}"]
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


def _skewed_text(rates: Sequence[Rate]) -> str:
    shown = [workers for workers in WORKERS if workers % 2 == 1]
    by_batch: dict[str, list[Rate]] = {}
    for one in rates:
        if one.workers in shown:
            by_batch.setdefault(one.noise, []).append(one)
    rows = [[name, *(f"{one.measured:.4f}" for one in some)] for name, some in by_batch.items()]
    hurt = [name.split()[-1] for name, some in by_batch.items() if some[-1].measured > some[0].measured]
    helped = [name.split()[-1] for name, some in by_batch.items() if some[-1].measured < some[0].measured]
    verdict = f"More workers hurt at batch {_list(hurt)}" if hurt else "More workers hurt at no batch"
    verdict += f" and help at batch {_list(helped)}." if helped else " and help at none."
    if "1" in hurt and helped:
        verdict += " Both are what the remark says: averaging a batch makes the noise symmetric enough."
    return "\n".join(
        [
            "**Skewed noise.** The same for the gradient of section 4, Remark 3, 50 with probability 0.1 and otherwise "
            "-1, averaged over a batch before the sign is taken:",
            "",
            common.table(["", *(f"M = {workers}" for workers in shown)], rows),
            "",
            verdict,
        ]
    )


def _network_text(real: Network, pieces: int) -> str:
    blocks = len(real.vote[0])
    rows = [
        [
            f"{workers}",
            common.spread([100 * value for value in vote], 2),
            common.spread([100 * value for value in mean], 2),
            f"{100 * bound:.0f}",
        ]
        for workers, vote, mean, bound in zip(ODD, real.vote, real.mean, real.bound, strict=True)
    ]
    class_rows = [
        _class_row(f"{one.low:g} to {one.high:g}", f"{one.coordinates:,}", one.noise, one.exponent)
        for one in real.classes
    ]
    gaussian = [noise_of(binomial_tail(workers, NormalDist().cdf(-GAUSSIAN)), GAUSSIAN) for workers in ODD]
    totals = [float(np.mean(row)) for row in real.vote]
    over = [workers for workers, total, bound in zip(ODD, totals, real.bound, strict=True) if total > bound]
    lines = [
        f"|g| that is stepped against falls {totals[0] / totals[-1]:.1f} times from {ODD[0]} to {ODD[-1]} workers"
        f" (√{ODD[-1]} = {math.sqrt(ODD[-1]):.1f}); "
        + (f"it is above the bound for {_list(over)} workers." if over else "it is below the bound everywhere."),
        f"The vote of {ODD[-1]} steps against {totals[-1] / float(np.mean(real.mean[-1])):.1f} times as much as the "
        "sign of their mean in full precision.",
    ]
    exponents = [one.exponent for one in real.classes if one.exponent is not None]
    if exponents:
        lines.append(
            f"The noise falls as M to a power from {max(exponents):.2f} to {min(exponents):.2f}, where 1/√M is -0.5 "
            f"and votes on a Gaussian gradient, of which the first ones gain least, come to {exponent(gaussian):.2f}."
        )
    lines.append(
        f"{100 * real.hurt:.1f} % of the coordinates, with {100 * real.hurt_l1:.2f} % of ‖g‖₁, are wrong on a single "
        f"worker more often than not (by {ERRORS:g} standard errors): there the noise is not unimodal and symmetric, "
        "and more workers hurt."
    )
    header = ["class of S", "coordinates", *(f"M = {workers}" for workers in ODD), "power of M"]
    return "\n".join(
        [
            f"**A real gradient.** The demo's transformer after {TRAINED} steps of Signum, batches of {SEQUENCES} "
            f"sequences. g is exact over {pieces} sequences, of which each worker draws its batch; of "
            f"{real.coordinates:,} coordinates {real.noiseless:,} have no noise or no gradient and are left out. Part "
            f"of ‖g‖₁, in %, in coordinates whose sign is wrong, Σ|gᵢ|·[wrong]/‖g‖₁, which Theorem 2(b) bounds by "
            f"‖{SIGMA}‖₁/(√M‖g‖₁); mean ± standard deviation of {blocks} blocks of {ODD[-1]} batches (seed {SEED}):",
            "",
            common.table(["M", "majority vote", "sign of the mean", "bound"], rows),
            "",
            "How the noise of the voted sign falls: the noise of a Gaussian gradient whose sign would be wrong as "
            f"often, -S / Φ⁻¹(wrong), by that of one worker's gradient, {SIGMA}, for coordinates of similar "
            f"S = |g|/{SIGMA}. Last, the same for a gradient that is Gaussian, as the number of workers and S = "
            f"{GAUSSIAN:g} give it:",
            "",
            common.table(header, [*class_rows, _class_row("Gaussian", "", gaussian, exponent(gaussian))]),
            "",
            " ".join(lines),
        ]
    )


def _class_row(name: str, coordinates: str, noise: Sequence[float], power: float | None) -> list[str]:
    cells = [f"{value:.3f}" if math.isfinite(value) else "" for value in noise]
    return [name, coordinates, *cells, "" if power is None else f"{power:.2f}"]


def _list(items: Sequence[object]) -> str:
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def _network_data(real: Network) -> dict[str, Any]:
    return vars(real) | {"workers": ODD, "classes": [vars(one) for one in real.classes]}


def _plot(known: Sequence[Rate], skewed: Sequence[Rate], real: Network) -> Figure:
    figure = common.new_figure(13, 8)
    panels = figure.subplots(2, 3).flat
    for noise, axes in zip(NOISES, panels, strict=False):
        for colour, workers in enumerate((1, 3, 15, 63)):
            some = [one for one in known if (one.noise, one.workers) == (noise.name, workers) and one.measured > 0]
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
    skewed_axes, mass_axes, noise_axes = list(panels)[-3:]
    for name in dict.fromkeys(one.noise for one in skewed):
        some = [one for one in skewed if one.noise == name and one.workers % 2 == 1]
        skewed_axes.plot([one.workers for one in some], [one.measured for one in some], "o-", label=name)
    skewed_axes.set(xlabel="workers M", ylabel="votes that are wrong", xscale="log")
    skewed_axes.set_title("section 4, Remark 3", fontsize="medium")
    for label, values in (("majority vote", real.vote), ("sign of the mean", real.mean)):
        mass_axes.plot(ODD, [np.mean(row) for row in values], "o-", label=label)
    mass_axes.plot(ODD, real.bound, "k--", linewidth=1, label="bound")
    mass_axes.set(xlabel="workers M", ylabel="part of ‖g‖₁ with the wrong sign", xscale="log", yscale="log")
    mass_axes.set_title("the demo's transformer", fontsize="medium")
    for one in real.classes:
        noise_axes.plot(ODD, one.noise, "o-", label=f"S from {one.low:g} to {one.high:g}")
    noise_axes.plot(ODD, [1 / math.sqrt(workers) for workers in ODD], "k--", linewidth=1, label="1/√M")
    noise_axes.set(xlabel="workers M", ylabel="noise of the voted sign", xscale="log", yscale="log")
    noise_axes.set_title("the demo's transformer", fontsize="medium")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


if __name__ == "__main__":
    sys.exit(common.main(run, __doc__))
