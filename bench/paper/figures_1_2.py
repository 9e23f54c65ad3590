"""Figures 1 and 2: density of gradient and noise during training, and histograms of the noise."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import common
from signvote.cli.demo import data
from signvote.cli.demo.model import Transformer, loss
from signvote.cli.demo.settings import CONTEXT
from signvote.diagnostics import BIMODAL, GradientStatistics
from signvote.optim import Signum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
METHODS = ("SGD", "Signum", "Adam")
SEQUENCES = 8  # of a micro-batch
WARMUP = 20  # steps
SAMPLED_AT = 0.5  # part of the training after which the shape of the noise is measured
HISTOGRAMS = 3  # coordinates shown of each method
EMBEDDING = "embedding.weight"


@dataclass(frozen=True)
class Size:
    """How much is done: how many micro-batches the data set has, how often it is gone through, and the rest."""

    seeds: tuple[int, ...] = common.SEEDS
    micro_batches: int = 48
    epochs: int = 4
    sampled: int = 200  # micro-batches for the shape of the noise


@dataclass(frozen=True)
class Job:
    method: str
    seed: int
    size: Size


@dataclass(frozen=True)
class Snapshot:
    """At the beginning of an epoch, over a full pass."""

    epoch: int
    loss: float
    gradient_density: float
    noise_density: float
    density_ratio: float
    cases: str
    noiseless: int
    coordinates: int


@dataclass(frozen=True)
class Shape:
    """Of the noise of micro-batches drawn at random, half-way through a training."""

    micro_batches: int
    absolute_skewness: dict[float, float]
    bimodality: dict[float, float]
    bimodal: float
    bimodal_embedding: float  # part of the embedding's coordinates
    bimodal_others: float
    noise: dict[str, list[float]]  # of some coordinates


@dataclass(frozen=True)
class Training:
    method: str
    seed: int
    snapshots: list[Snapshot]
    shape: Shape | None


def new_optimizer(method: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """With the settings of `signvote demo`."""
    if method == "SGD":
        return torch.optim.SGD(model.parameters(), lr=0.15, momentum=0.9, nesterov=True)
    if method == "Signum":
        return Signum(model.parameters(), lr=2e-3, momentum=0.7, weight_decay=0.5)
    return torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.8, 0.95), weight_decay=0.1)


def train(job: Job) -> Training:
    size, steps = job.size, job.size.epochs * job.size.micro_batches
    torch.manual_seed(job.seed)
    model, generator = Transformer(context=CONTEXT), torch.Generator().manual_seed(job.seed)
    pieces = data.every(data.load_corpus().train, size.micro_batches * SEQUENCES, CONTEXT)
    optimizer = new_optimizer(job.method, model)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP, (steps - step) / steps))
    snapshots, shape = [snapshot(model, pieces, 0)], None
    sampled_after = round(SAMPLED_AT * steps)
    for epoch in range(size.epochs):
        order = pieces[torch.randperm(len(pieces), generator=generator)]
        for step, batch in enumerate(torch.split(order, SEQUENCES), epoch * size.micro_batches):
            if step == sampled_after and job.seed == size.seeds[0]:
                shape = sample_noise(model, pieces, size.sampled, generator)
            backward(model, batch)
            optimizer.step()
            scheduler.step()
        snapshots.append(snapshot(model, pieces, epoch + 1))
    return Training(job.method, job.seed, snapshots, shape)


def backward(model: torch.nn.Module, batch: Tensor) -> float:
    model.zero_grad()
    value = loss(model, batch)
    value.backward()  # type: ignore[no-untyped-call]
    return value.item()


def snapshot(model: torch.nn.Module, pieces: Tensor, epoch: int) -> Snapshot:
    statistics = GradientStatistics(shape=False, keep=0)
    losses = []
    for batch in torch.split(pieces, SEQUENCES):
        losses.append(backward(model, batch))
        statistics.update(model.named_parameters())
    found = statistics.summary()
    return Snapshot(
        epoch,
        float(np.mean(losses)),
        found.gradient_density,
        found.noise_density,
        found.density_ratio,
        found.cases(),
        found.noiseless,
        found.coordinates,
    )


def sample_noise(model: torch.nn.Module, pieces: Tensor, micro_batches: int, generator: torch.Generator) -> Shape:
    statistics = GradientStatistics(keep=200)
    for _ in range(micro_batches):
        backward(model, pieces[torch.randint(len(pieces), (SEQUENCES,), generator=generator)])
        statistics.update(model.named_parameters())
    found, by_parameter = statistics.summary(), statistics.by_parameter()
    assert found.absolute_skewness is not None
    assert found.bimodality is not None
    assert found.bimodal is not None
    noisy = {name: one.coordinates - one.noiseless for name, one in by_parameter.items()}
    above = {name: noisy[name] * (one.bimodal or 0.0) for name, one in by_parameter.items()}
    # The first of those kept, which lie in the order of the parameters, are not a random choice; every so many are.
    noise = {f"{name}[{index}]": values.tolist() for (name, index), values in statistics.noise.items() if values.any()}
    chosen = sorted(np.random.default_rng(0).choice(len(noise), HISTOGRAMS, replace=False).tolist())
    return Shape(
        micro_batches,
        found.absolute_skewness,
        found.bimodality,
        found.bimodal,
        above[EMBEDDING] / noisy[EMBEDDING],
        (sum(above.values()) - above[EMBEDDING]) / (sum(noisy.values()) - noisy[EMBEDDING]),
        {list(noise)[place]: list(noise.values())[place] for place in chosen},
    )


def run(quick: bool) -> common.Result:
    size = Size(seeds=(0, 1), micro_batches=2, epochs=2, sampled=4) if quick else Size()
    trainings = common.each(train, [Job(method, seed, size) for method in METHODS for seed in size.seeds])
    shapes = {one.method: one.shape for one in trainings if one.shape is not None}
    return common.Result(
        name="figures_1_2",
        title="Figures 1 and 2: density and shape of the gradient's noise",
        markdown="\n\n".join([_density_text(trainings, size), _shape_text(shapes)]),
        figure=_plot(trainings, shapes, size),
        data={"size": asdict(size), "sequences": SEQUENCES, "trainings": [asdict(one) for one in trainings]},
    )


def _density_text(trainings: Sequence[Training], size: Size) -> str:
    rows = []
    for method in METHODS:
        for epoch in range(size.epochs + 1):
            some = [one.snapshots[epoch] for one in trainings if one.method == method]
            rows.append(
                [
                    f"{method}, epoch {epoch}",
                    common.spread([one.loss for one in some], 2),
                    common.spread([one.gradient_density for one in some]),
                    common.spread([one.noise_density for one in some]),
                    common.spread([one.density_ratio for one in some], 2),
                    ", ".join(sorted({one.cases for one in some})),
                ]
            )
    first = trainings[0].snapshots[0]
    return "\n".join(
        [
            f"The demo's transformer, {first.coordinates:,} coordinates, on {size.micro_batches * SEQUENCES} sequences "
            f"of {CONTEXT} bytes in micro-batches of {SEQUENCES}, with the demo's settings of each method. At the "
            f"beginning of every epoch a full pass gives the exact gradient g and the standard deviation {SIGMA} over "
            f"micro-batches (`GradientStatistics`). φ is equation (1); mean ± standard deviation of {len(size.seeds)} "
            f"seeds ({', '.join(map(str, size.seeds))}). The cases are those of section 3.3 that the densities "
            "allow, with 10 for *much greater*.",
            "",
            common.table(["", "loss", "φ(g)", f"φ({SIGMA})", f"φ({SIGMA})/φ(g)", "case"], rows),
            "",
            _density_verdict(trainings),
        ]
    )


def _density_verdict(trainings: Sequence[Training]) -> str:
    snapshots = [one for training in trainings for one in training.snapshots]
    later = [one for one in snapshots if one.epoch > 0]
    ratios = [one.density_ratio for one in snapshots]
    lines = [f"φ({SIGMA})/φ(g) is {min(ratios):.2f} to {max(ratios):.2f}:"]
    if max(ratios) < 10 and min(ratios) > 0.1:
        lines.append("gradient and noise are of the same order of density throughout, as the paper found.")
    else:
        lines.append("not always of the same order of density, as the paper found them.")
    if min(ratios) > 1:
        lines.append("The noise is the denser of the two in every case.")
    lines.append(
        f"From the first epoch on φ(g) is {min(one.gradient_density for one in later):.3f} to "
        f"{max(one.gradient_density for one in later):.3f} (a Gaussian vector has {2 / math.pi:.3f}), φ({SIGMA}) "
        f"{min(one.noise_density for one in later):.3f} to {max(one.noise_density for one in later):.3f}."
    )
    correlations = [
        float(np.corrcoef(*np.array([(one.gradient_density, one.noise_density) for one in training.snapshots]).T)[0, 1])
        for training in trainings
    ]
    lines.append(
        f"The two rise and fall together with a correlation of {min(correlations):.2f} to {max(correlations):.2f} over "
        "the epochs of a training."
    )
    start = trainings[0].snapshots[0]
    end = trainings[0].snapshots[-1]
    lines.append(
        f"{start.noiseless:,} coordinates have no noise at the start, {end.noiseless:,} at the end of the first "
        "training: the blocks start as the identity, and some bytes never occur."
    )
    return " ".join(lines)


def _shape_text(shapes: dict[str, Shape]) -> str:
    rows = [
        [
            method,
            f"{shape.absolute_skewness[0.5]:.2f}",
            f"{shape.absolute_skewness[0.95]:.2f}",
            f"{shape.bimodality[0.5]:.2f}",
            f"{100 * shape.bimodal_embedding:.1f}",
            f"{100 * shape.bimodal_others:.1f}",
        ]
        for method, shape in shapes.items()
    ]
    n = next(iter(shapes.values())).micro_batches
    deviation = math.sqrt(6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3)))
    rows.append(["Gaussian noise", f"{0.674 * deviation:.2f}", f"{1.96 * deviation:.2f}", "0.33", "", ""])
    return "\n".join(
        [
            f"Half-way through the training of the first seed, {n} micro-batches drawn at random: skewness and Sarle's "
            "bimodality coefficient of every coordinate's noise, and the part of the coordinates, in %, where the "
            f"coefficient is above {BIMODAL:.3f}, that of a uniform distribution. The last row is what Gaussian noise "
            "gives with so many values.",
            "",
            common.table(
                [
                    "",
                    "median of absolute skewness",
                    "95 % quantile",
                    "median bimodality",
                    "above, embedding",
                    "above, other parameters",
                ],
                rows,
            ),
            "",
            _shape_verdict(list(shapes.values())),
        ]
    )


def _shape_verdict(shapes: Sequence[Shape]) -> str:
    embedding = [100 * one.bimodal_embedding for one in shapes]
    others = [100 * one.bimodal_others for one in shapes]
    lines = [
        f"Outside the embedding {min(others):.1f} to {max(others):.1f} % of the coordinates have noise of more than "
        f"one mode or much skewness, in the embedding {min(embedding):.1f} to {max(embedding):.1f} %."
    ]
    if min(embedding) > max(others):
        lines.append(
            "There the assumption of Theorem 2(b) is least true: the row of a rare byte gets no gradient from most "
            "micro-batches and a large one from a few."
        )
    most = max(one.bimodal for one in shapes)
    if most < 0.5:
        lines.append(
            f"So most coordinates do not contradict the paper, which found all that it drew unimodal and roughly "
            f"symmetric, but up to {100 * most:.1f} % of them do."
        )
    else:
        lines.append("This contradicts the paper, which found the noise unimodal and roughly symmetric.")
    return " ".join(lines)


def _plot(trainings: Sequence[Training], shapes: dict[str, Shape], size: Size) -> Figure:
    figure = common.new_figure(12, 10)
    grid = figure.add_gridspec(1 + len(METHODS), HISTOGRAMS)
    for column, method in enumerate(METHODS):
        axes = figure.add_subplot(grid[0, column])
        for label, field in (("gradient, φ(g)", "gradient_density"), (f"noise, φ({SIGMA})", "noise_density")):
            values = np.array([[getattr(one, field) for one in t.snapshots] for t in trainings if t.method == method])
            axes.errorbar(
                range(size.epochs + 1),
                values.mean(axis=0),
                values.std(axis=0, ddof=1),
                fmt="o-",
                capsize=3,
                label=label,
            )
        axes.set(xlabel="epoch", ylabel="density", ylim=(0, None), title=method)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for row, method in enumerate(METHODS, 1):
        for column, (name, noise) in enumerate(shapes[method].noise.items()):
            axes = figure.add_subplot(grid[row, column])
            axes.hist(noise, bins=30)
            axes.set_title(f"{method}: {name}", fontsize="small")
            axes.locator_params(axis="x", nbins=5)
            axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
            axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    sys.exit(common.main(run, __doc__))
