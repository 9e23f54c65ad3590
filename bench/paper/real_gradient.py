"""How often votes on the gradient of the demo's language model are wrong, against its noise: Theorem 2(b).

Part of votes.py. Votes are packed and counted by signvote's own kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

import common
from known_noise import ERRORS, ODD, SEED, SIGMA, Floats, binomial_tail
from signvote import majority_vote, pack_signs
from signvote.cli.demo import data
from signvote.cli.demo.model import Transformer, loss
from signvote.cli.demo.settings import CONTEXT, SEQUENCES
from signvote.diagnostics import GradientStatistics
from signvote.optim import Signum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINED = 200  # steps before the gradient is measured
PIECES = 4096  # the data set: what the exact gradient is over, and what workers draw from
BLOCKS = 12  # of as many workers as the largest vote has
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


def text(real: Network, pieces: int) -> str:
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
        + (
            f"it is above the bound for {common.listed(over)} workers." if over else "it is below the bound everywhere."
        ),
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


def data_of(real: Network) -> dict[str, Any]:
    return vars(real) | {"workers": ODD, "classes": [vars(one) for one in real.classes]}


def draw(mass_axes: Axes, noise_axes: Axes, real: Network) -> None:
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
