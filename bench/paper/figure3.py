"""Figure 3's question, of figure3_language.py and figure3_digits.py: Signum against Adam and SGD.

All are tuned by grids of the same size, on what neither training nor test has seen, and then trained with other seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import common
from training import BETA2, MOMENTUM, Curve, Training, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPTIMIZERS = {"signum": "Signum", "adam": "AdamW", "sgd": "SGD"}
WORKERS = (1, 4)
DECAYS = (0.0, 1e-3)
TUNING_SEED = 1000
LAST = 10  # steps whose mean is the training loss at the end


@dataclass(frozen=True)
class Plan:
    """What is compared on one task."""

    task: str
    steps: int
    tuning_steps: int
    seeds: tuple[int, ...]
    learning_rates: dict[str, tuple[float, ...]]

    def grid(self, optimizer: str, workers: int) -> list[Training]:
        return [
            Training(self.task, optimizer, workers, lr, decay, self.tuning_steps, TUNING_SEED, "tuning")
            for lr, decay in product(self.learning_rates[optimizer], DECAYS)
        ]

    def quick(self) -> Plan:
        rates = {optimizer: lrs[1:2] for optimizer, lrs in self.learning_rates.items()}
        return replace(self, steps=4, tuning_steps=2, seeds=self.seeds[:2], learning_rates=rates)


@dataclass(frozen=True)
class Contender:
    """One optimizer with so many workers: the best setting, and its trainings."""

    optimizer: str
    workers: int
    best: Training
    curves: list[Curve]

    @property
    def label(self) -> str:
        if self.workers == 1:
            return OPTIMIZERS[self.optimizer]
        return f"{OPTIMIZERS[self.optimizer]}, {'majority vote' if self.optimizer == 'signum' else 'mean in fp32'}"

    @property
    def losses(self) -> list[float]:
        return [curve.loss for curve in self.curves]

    @property
    def errors(self) -> list[float]:
        return [100.0 * curve.errors for curve in self.curves]

    @property
    def training_losses(self) -> list[float]:
        return [statistics.fmean(curve.losses[-LAST:]) for curve in self.curves]


def measure(plan: Plan) -> tuple[list[tuple[Training, Curve]], list[Contender]]:
    """Tune everything, then train the best; the longest first, so that no process is left with one at the end."""
    pairs = list(product(OPTIMIZERS, sorted(WORKERS, reverse=True)))
    pairs.sort(key=lambda pair: -pair[1])
    grids = [training for optimizer, workers in pairs for training in plan.grid(optimizer, workers)]
    tuning = list(zip(grids, common.each(train, grids), strict=True))
    found: dict[tuple[str, int], Training] = {}
    for optimizer, workers in pairs:
        own = [pair for pair in tuning if (pair[0].optimizer, pair[0].workers) == (optimizer, workers)]
        found[optimizer, workers] = min(own, key=lambda pair: _or_infinity(pair[1].loss))[0]
    finals = [replace(found[pair], steps=plan.steps, seed=seed, split="test") for pair in pairs for seed in plan.seeds]
    curves = dict(zip(finals, common.each(train, finals), strict=True))
    contenders = [
        Contender(
            optimizer,
            workers,
            found[optimizer, workers],
            [curve for training, curve in curves.items() if (training.optimizer, training.workers) == pair],
        )
        for workers in WORKERS
        for optimizer in OPTIMIZERS
        if (pair := (optimizer, workers))
    ]
    return tuning, contenders


def _or_infinity(loss: float) -> float:
    return loss if loss == loss else float("inf")


def result(name: str, title: str, introduction: str, plan: Plan) -> common.Result:
    tuning, contenders = measure(plan)
    rates = len(plan.learning_rates["signum"])
    conditions = (
        f"Every optimizer had {rates * len(DECAYS)} settings ({rates} learning rates, {len(DECAYS)} weight decays), "
        f"each trained for {plan.tuning_steps} steps and judged on held-out data that is not the test's; the best was "
        f"trained for {plan.steps} steps with seeds {', '.join(map(str, plan.seeds))}: mean ± standard deviation. All "
        f"have momentum {MOMENTUM:g} (AdamW's second one is {BETA2:g}), a tenth of the steps of warm-up and a linear "
        f"schedule to 0. A decay of {DECAYS[1]:g} takes that part of each weight in a step at the top of the schedule. "
        f"The {WORKERS[1]} workers are simulated in one process, each with batches and a momentum of its own; the vote "
        f"is made by the hook's kernels, with its coins, so these are the bits that {WORKERS[1]} gloo ranks would "
        "exchange."
    )
    ends = common.table(
        ["workers, optimizer", "learning rate", "decay", "training loss", "test loss", "test errors, %"],
        [
            [
                f"{one.workers}: {one.label}",
                f"{one.best.lr:g}",
                f"{one.best.decay:g}",
                common.spread(one.training_losses),
                common.spread(one.losses),
                common.spread(one.errors, 2),
            ]
            for one in contenders
        ],
    )
    pairs = compared(contenders)
    chance = 2.0 ** (1 - len(plan.seeds))
    differences = common.table(
        ["difference, seed by seed", "test loss", "test errors, %"],
        [[label, common.extent(losses), common.extent(errors, 2)] for label, losses, errors in pairs],
    )
    reading = (
        "Equal seeds mean equal models and, for as many workers, equal batches. Below, fewer and more mean in every "
        f"seed: with {len(plan.seeds)} of them, that happens by chance alone with probability {chance:.2g}."
    )
    parts = [introduction, conditions, ends, *edges(plan, contenders), differences, reading, verdict(pairs)]
    return common.Result(name, title, "\n\n".join(parts), figure(contenders), data(plan, tuning, contenders))


def edges(plan: Plan, contenders: Sequence[Contender]) -> list[str]:
    """Which of the best learning rates are at an end of their grid, where a better one may lie beyond."""
    found = [
        f"{one.label} with {one.workers} ({one.best.lr:g})"
        for one in contenders
        if one.best.lr in (plan.learning_rates[one.optimizer][0], plan.learning_rates[one.optimizer][-1])
    ]
    if not found:
        return ["None of the best learning rates is at an end of its grid."]
    return [f"At an end of its grid, so that a better learning rate may lie beyond it: {'; '.join(found)}."]


Pair = tuple[str, list[float], list[float]]


def compared(contenders: Sequence[Contender]) -> list[Pair]:
    """What is subtracted, and the differences of loss and errors with each seed."""
    at = {(one.optimizer, one.workers): one for one in contenders}
    few, many = WORKERS
    pairs = [(at["signum", workers], at[other, workers]) for workers in WORKERS for other in ("adam", "sgd")]
    pairs += [(at[optimizer, many], at[optimizer, few]) for optimizer in OPTIMIZERS]
    return [
        (
            f"{ours.workers}: {ours.label} - {theirs.workers}: {theirs.label}",
            [a - b for a, b in zip(ours.losses, theirs.losses, strict=True)],
            [a - b for a, b in zip(ours.errors, theirs.errors, strict=True)],
        )
        for ours, theirs in pairs
    ]


def verdict(pairs: Sequence[Pair]) -> str:
    """What the paper says of Signum's test errors, and what was found."""
    adam, sgd, voted_adam, voted_sgd = (direction(errors) for _, _, errors in pairs[:4])
    return (
        "The paper's Signum makes as many test errors as Adam, and some 2 % more than SGD with a tuned weight decay. "
        f"Here it makes {adam} AdamW and {sgd} SGD; voted with {WORKERS[1]} workers, {voted_adam} AdamW and "
        f"{voted_sgd} SGD. On one worker that {agrees(adam, EQUAL)} the paper on Adam, and {agrees(sgd, MORE)} it on "
        f"SGD; on {WORKERS[1]} it {agrees(voted_adam, EQUAL)} it on Adam, and {agrees(voted_sgd, MORE)} it on SGD. A "
        "network so small, trained so briefly, says little of others."
    )


EQUAL, FEWER, MORE = "about as many errors as", "fewer errors than", "more errors than"


def direction(differences: Sequence[float]) -> str:
    if all(difference < 0.0 for difference in differences):
        return FEWER
    return MORE if all(difference > 0.0 for difference in differences) else EQUAL


def agrees(found: str, expected: str) -> str:
    return "agrees with" if found == expected else "does not confirm"


def figure(contenders: Sequence[Contender]) -> Figure:
    """Training loss over steps: the mean of the seeds, their least and most as a band; a dot: test loss."""
    found = common.new_figure(11.0, 4.2)
    panels = found.subplots(1, len(WORKERS), sharey=True)
    for axes, workers in zip(panels, WORKERS, strict=True):
        for one in contenders:
            if one.workers != workers:
                continue
            curves = list(zip(*(smooth(curve.losses) for curve in one.curves), strict=True))
            steps = range(1, len(curves) + 1)
            (line,) = axes.plot(steps, [statistics.fmean(losses) for losses in curves], label=one.label, linewidth=1.2)
            low, high = [min(losses) for losses in curves], [max(losses) for losses in curves]
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
            axes.plot([len(curves)] * len(one.losses), one.losses, ".", color=line.get_color())
        axes.set_title("one worker" if workers == 1 else f"{workers} workers", fontsize="medium")
        axes.set(xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(title="line: training, dot: test", fontsize="small")
    panels[0].set_ylabel("loss")
    return found


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of the last few losses at each step, so that the line can be read."""
    return [statistics.fmean(losses[max(0, step - LAST + 1) : step + 1]) for step in range(len(losses))]


def data(plan: Plan, tuning: Sequence[tuple[Training, Curve]], contenders: Sequence[Contender]) -> dict[str, Any]:
    return {
        "plan": asdict(plan) | {"decays": DECAYS, "momentum": MOMENTUM, "beta2": BETA2, "tuning_seed": TUNING_SEED},
        "tuning": [asdict(training) | {"loss": curve.loss} for training, curve in tuning],
        "contenders": [
            {
                "optimizer": one.optimizer,
                "workers": one.workers,
                "lr": one.best.lr,
                "decay": one.best.decay,
                "test_losses": one.losses,
                "test_errors_percent": one.errors,
                "training_losses": [[round(loss, 4) for loss in curve.losses] for curve in one.curves],
            }
            for one in contenders
        ],
    }
