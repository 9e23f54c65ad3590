"""Workers that send the opposite of every sign: 0 to 4 of 7, on the language model of `signvote demo` at half width.

python bench/paper/byzantine.py --out signvote-bench
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import common
from training import MOMENTUM, Curve, Language, Training, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORKERS = 7
FLIPPED = (0, 1, 2, 3, 4)
SHARDED = (1, 3)
LEARNING_RATES = (1.3e-3, 4e-3, 1.2e-2)
STEPS, TUNING_STEPS, TUNING_SEED = 90, 45, 1000

Found = dict[Training, Curve]


def run(quick: bool) -> common.Result:
    rates = LEARNING_RATES[1:2] if quick else LEARNING_RATES
    steps, tuning_steps = (3, 2) if quick else (STEPS, TUNING_STEPS)
    seeds = common.SEEDS[:2] if quick else common.SEEDS

    tunings = [
        Training("language", "signum", WORKERS, lr, 0.0, tuning_steps, TUNING_SEED, "tuning", flipped)
        for flipped in FLIPPED
        for lr in rates
    ]
    tuned = dict(zip(tunings, common.each(train, tunings), strict=True))
    best = {flipped: best_rate(tuned, flipped) for flipped in FLIPPED}

    voted = [
        Training("language", "signum", WORKERS, best[flipped], 0.0, steps, seed, "test", flipped)
        for flipped in FLIPPED
        for seed in seeds
    ]
    sharded = [replace(one, sharded=True) for one in voted if one.flipped in SHARDED]
    alone = [Training("language", "signum", 1, best[0], 0.0, steps, seed) for seed in seeds]
    jobs = [*voted, *sharded, *alone]
    found = dict(zip(jobs, common.each(train, jobs), strict=True))

    start = statistics.fmean(found[one].losses[0] for one in voted)
    ends = {flipped: losses(found, [one for one in voted if one.flipped == flipped]) for flipped in FLIPPED}
    sharded_ends = {flipped: losses(found, [one for one in sharded if one.flipped == flipped]) for flipped in SHARDED}
    alone_ends = losses(found, alone)

    parts = [
        f"{WORKERS} workers train the transformer of `signvote demo` at half its width for {steps} steps by majority "
        f"vote, momentum {MOMENTUM:g}, without weight decay, {Language.SEQUENCES} sequences for each worker in each "
        "step; some send the opposite of every sign. Held-out loss in nats per byte at the end, seeds "
        f"{', '.join(map(str, seeds))}, mean ± standard deviation. The loss before training was {start:.3f}. The "
        "learning rate is chosen for each number of flipped workers, by the loss on other held-out text after "
        f"{tuning_steps} steps.",
        common.table(
            ["flipped workers", "learning rate", "loss", "loss, sharded with their shards flipped too"],
            [
                [
                    f"{flipped} of {WORKERS}",
                    f"{best[flipped]:g}",
                    common.spread(ends[flipped]),
                    common.spread(sharded_ends[flipped]) if flipped in sharded_ends else "",
                ]
                for flipped in FLIPPED
            ],
        ),
        f"One honest worker alone, at the learning rate of none flipped: {common.spread(alone_ends)}. The tuning, loss "
        "with each learning rate:",
        common.table(
            ["flipped workers", *(f"{lr:g}" for lr in rates)],
            [
                [
                    f"{flipped} of {WORKERS}",
                    *(f"{curve.loss:.3f}" for training, curve in tuned.items() if training.flipped == flipped),
                ]
                for flipped in FLIPPED
            ],
        ),
        *edges(best, rates),
        verdict(start, ends, sharded_ends, alone_ends),
        "What is assumed: all workers draw from the same data and have batches of the same size; the flipped ones "
        "compute an honest gradient and negate it, without knowing of each other, and lie about nothing else. The vote "
        "is simulated in one process, by the hook's kernels and with its coins, and the server is honest: that is "
        '`topology="allgather"`, where every worker counts for itself, or an honest `"server"`. In `"sharded"` each '
        f"worker is the server of 1/{WORKERS} of the coordinates; the last column shows flipped workers that answer "
        "for their shard with the opposite of the vote. Workers that are out to do harm can do more than flip signs.",
    ]
    data = {
        "workers": WORKERS,
        "momentum": MOMENTUM,
        "start": start,
        "tuning": [asdict(training) | {"loss": curve.loss} for training, curve in tuned.items()],
        "trainings": [
            asdict(training) | {"test_loss": curve.loss, "training_losses": [round(loss, 4) for loss in curve.losses]}
            for training, curve in found.items()
        ],
    }
    title = "Byzantine workers: signs flipped by 0 to 4 of 7"
    return common.Result("byzantine", title, "\n\n".join(parts), figure(found, voted), data)


def best_rate(tuned: Found, flipped: int) -> float:
    own = {training.lr: curve.loss for training, curve in tuned.items() if training.flipped == flipped}
    return min(own, key=lambda lr: own[lr] if own[lr] == own[lr] else float("inf"))


def edges(best: dict[int, float], rates: Sequence[float]) -> list[str]:
    """Where a better learning rate may lie beyond the grid; with a majority of flipped workers none is good."""
    honest = [flipped for flipped in best if 2 * flipped < WORKERS]
    found = [str(flipped) for flipped in honest if best[flipped] in (rates[0], rates[-1])]
    return [f"The best is at an end of the grid with {', '.join(found)} flipped."] if found else []


def losses(found: Found, trainings: Sequence[Training]) -> list[float]:
    return [found[training].loss for training in trainings]


def verdict(start: float, ends: dict[int, list[float]], sharded: dict[int, list[float]], alone: Sequence[float]) -> str:
    """Where it breaks: where a training of any seed ends no lower than it began."""
    broken = [flipped for flipped, found in ends.items() if not max(found) < start]
    learning = [flipped for flipped in ends if flipped not in broken]
    sentences = [
        f"It learns with {', '.join(map(str, learning))} of {WORKERS} flipped"
        + (
            f", and ends above the loss it began with, with at least one seed, at {', '.join(map(str, broken))}."
            if broken
            else "; in none of these did it end above the loss it began with."
        )
    ]
    minority = [flipped for flipped in ends if 2 * flipped < WORKERS]
    expected = minority == learning
    sentences.append(
        "So it breaks where the flipped ones are the majority, as the theory has it."
        if expected
        else "The theory has it break where the flipped ones are the majority, and only there: not what was found."
    )
    most = max(minority)
    cost = statistics.fmean(ends[most]) - statistics.fmean(ends[0])
    against = statistics.fmean(ends[most]) - statistics.fmean(alone)
    sentences.append(
        f"{most} of {WORKERS} cost {cost:.3f} nats against none, and end {abs(against):.3f} "
        f"{'above' if against > 0.0 else 'below'} one honest worker alone: a vote whose margin is one worker is worth "
        f"{'less' if against > 0.0 else 'more'} than one worker's sign here."
    )
    for flipped, found in sharded.items():
        more = statistics.fmean(found) - statistics.fmean(ends[flipped])
        end = "no lower than it began" if not max(found) < start else "below the loss it began with"
        sentences.append(f"With their shards flipped too, {flipped} cost {more:.3f} nats more, and it ends {end}.")
    return " ".join(sentences)


def figure(found: Found, voted: Sequence[Training]) -> Figure:
    """Training loss over steps: the mean of the seeds, their least and most as a band."""
    drawn = common.new_figure(7.0, 4.2)
    axes = drawn.subplots()
    for flipped in FLIPPED:
        curves = list(zip(*(found[one].losses for one in voted if one.flipped == flipped), strict=True))
        steps = range(1, len(curves) + 1)
        label = f"{flipped} of {WORKERS}"
        (line,) = axes.plot(steps, [statistics.fmean(column) for column in curves], label=label, linewidth=1.2)
        low, high = [min(column) for column in curves], [max(column) for column in curves]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="training loss, nats per byte", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="flipped workers", fontsize="small")
    return drawn


if __name__ == "__main__":
    sys.exit(common.main(run, __doc__))
