"""What a person reads of time_to_loss.py: tables, bars and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddp.training import PLAIN_STEPS, Curve, Timing
from ddp.trainings import COMPARED, LABELS, METHODS, POWERSGD, Plan, Store
from signvote.cli.bench.measure import Spread

BAR = 5.0  # times sooner than fp32 at 100 Mb/s
TICKS = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]  # seconds, in the plot


def steps_to(curve: Curve, loss: float) -> float | None:
    """After how many steps the loss is first there, on a straight line between two measurements; None: never."""
    before: tuple[int, float] | None = None
    for step, found in zip(curve.at, curve.losses, strict=True):
        if found is not None and found <= loss:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - found)
        before = None if found is None else (step, found)
    return None


def clock(timing: Timing, method: str, steps: float) -> float:
    """Seconds of so many steps, by the median of a step; PowerSGD's first are plain."""
    plain = min(steps, PLAIN_STEPS) if method in POWERSGD else 0.0
    return plain * step_seconds(timing, "fp32").median + (steps - plain) * step_seconds(timing, method).median


def step_seconds(timing: Timing, method: str) -> Spread:
    return Spread.of(timing.seconds[method])


@dataclass(frozen=True)
class Times:
    """Seconds of training to a loss with each seed, and how many times as long as the vote's; None: never there."""

    rate: str
    sleep: float
    method: str
    loss: float
    seconds: list[float | None]
    times_vote: list[float | None]


def losses_to_reach(plan: Plan, store: Store) -> list[float]:
    """Round losses down to the lowest that the vote and AdamW over fp32 reach with all seeds."""
    lowest = [
        min((loss for loss in curve.losses if loss is not None), default=math.inf)
        for method in COMPARED
        for curve in curves(plan, store, method)
    ]
    last = math.ceil(20 * max(lowest)) / 20
    return [round(last + more, 2) for more in (0.4, 0.2, 0.1, 0.0)]


def curves(plan: Plan, store: Store, method: str) -> list[Curve]:
    found = (store.curve(plan.training(method, plan.best(method, store), seed)) for seed in plan.seeds)
    return [curve for curve in found if curve is not None]


def times(plan: Plan, store: Store) -> list[Times]:
    found = []
    for rate in plan.rates:
        for sleep in (0.0, plan.sleep):
            timing = store.timing(plan.turns(rate, sleep))
            assert timing is not None
            for loss in losses_to_reach(plan, store):
                vote: list[float | None] = []
                for method in METHODS:  # the vote first
                    steps = [steps_to(curve, loss) for curve in curves(plan, store, method)]
                    seconds = [None if step is None else clock(timing, method, step) for step in steps]
                    vote = vote or seconds
                    ratios = [a / b if a and b else None for a, b in zip(seconds, vote, strict=True)]
                    found.append(Times(rate, sleep, method, loss, seconds, ratios))
    return found


@dataclass(frozen=True)
class Check:
    """A whole training on a link: what its clock showed, against the steps' median times their number."""

    rate: str
    method: str
    seconds: float
    predicted: float
    same_losses: bool


def checks(plan: Plan, store: Store) -> list[Check]:
    found = []
    for rate in plan.rates:
        timing = store.timing(plan.turns(rate, 0.0))
        for method in COMPARED:
            lr = plan.best(method, store)
            run = store.curve(plan.training(method, lr, plan.seeds[0], rate))
            curve = store.curve(plan.training(method, lr, plan.seeds[0]))
            assert run is not None
            assert curve is not None
            assert timing is not None
            predicted = clock(timing, method, plan.steps)
            found.append(Check(rate, method, run.seconds[-1], predicted, run.losses == curve.losses))
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean, least and most."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return f"in {len(known)} of {len(values)}"
    low, mean, high = min(known), sum(known) / len(known), max(known)
    return f"{mean:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def computation(sleep: float) -> str:
    return f"{1e3 * sleep:g} ms a step slept instead of computed" if sleep else "computed on this machine"


def report(plan: Plan, store: Store) -> str:
    parts = []
    rows = [["", "learning rate", "settings tried", "loss at the end, mean (least-most)", "replicas identical"]]
    for method in METHODS:
        found = curves(plan, store, method)
        identical = "yes" if all(curve.identical for curve in found) else "NO"
        ends = spread([curve.losses[-1] for curve in found], 3)
        tried = plan.tried(method, store)
        rows.append([LABELS[method], f"{plan.best(method, store):g}", f"{len(tried)}", ends, identical])
    parts.append(table(rows))
    for rate in plan.rates:
        for sleep in (0.0, plan.sleep):
            timing = store.timing(plan.turns(rate, sleep))
            assert timing is not None
            floor = step_seconds(timing, "noop").median
            rows = [["", "ms a step, median (quartiles)", "more than no exchange", "KB on the link a step"]]
            for method in LABELS:
                one = step_seconds(timing, method)
                cells = f"{1e3 * one.median:.1f} ({1e3 * one.low:.1f}-{1e3 * one.high:.1f})"
                more = "" if method == "noop" else f"{1e3 * (one.median - floor):.1f}"
                rows.append([LABELS[method], cells, more, f"{timing.link_sent[method] / 1e3:.0f}"])
            parts.append(f"Steps, {rate}, {computation(sleep)}\n{table(rows)}")
    found_times = times(plan, store)
    for rate in plan.rates:
        for sleep in (0.0, plan.sleep):
            some = [one for one in found_times if (one.rate, one.sleep) == (rate, sleep)]
            losses = list(dict.fromkeys(one.loss for one in some))
            rows = [["", *(f"to {loss:.2f}: s" for loss in losses), *(f"to {loss:.2f}: / vote" for loss in losses)]]
            for method in METHODS:
                own = [one for one in some if one.method == method]
                seconds = [spread(one.seconds, 1) for one in own]
                rows.append([LABELS[method], *seconds, *(spread(one.times_vote, 2) for one in own)])
            parts.append(f"Seconds to a held-out loss, {rate}, {computation(sleep)}\n{table(rows)}")
    rows = [["whole training", "rate", "s measured", "s by steps", "ratio", "same losses"]]
    for check in checks(plan, store):
        same = "yes" if check.same_losses else "NO"
        numbers = [f"{check.seconds:.1f}", f"{check.predicted:.1f}", f"{check.seconds / check.predicted:.3f}"]
        rows.append([LABELS[check.method], check.rate, *numbers, same])
    parts.append(table(rows))
    return "\n\n".join([*parts, *bars(found_times)])


def bars(found: Sequence[Times]) -> list[str]:
    """The bar at 100 Mb/s, at the lowest of the losses."""
    lines = []
    for sleep in sorted({one.sleep for one in found}):
        some = {
            one.method: one for one in found if one.rate == "100mbit" and one.sleep == sleep
        }  # the last: the lowest
        for method, bar in (("fp32", BAR), ("fp16", 1.0)):
            if method in some:
                ratios = some[method].times_vote
                known = [ratio for ratio in ratios if ratio is not None]
                met = len(known) == len(ratios) and sum(known) / len(known) >= bar
                lines.append(
                    f"{'met ' if met else 'MISS'}  100mbit, {computation(sleep)}: {LABELS[method]} takes "
                    f"{spread(ratios, 2)} times as long as the vote to {some[method].loss:.2f}; bar {bar:g}"
                )
    return ["\n".join(lines)] if lines else []


def write_plot(path: Path, plan: Plan, store: Store) -> None:
    """Loss over seconds: the mean of the seeds, their least and most as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(plan.rates), sharey=True, squeeze=False)
    for row, sleep in zip(panels, (0.0, plan.sleep), strict=True):
        for axes, rate in zip(row, plan.rates, strict=True):
            timing = store.timing(plan.turns(rate, sleep))
            assert timing is not None
            for method in METHODS:
                found = curves(plan, store, method)
                columns = [
                    [math.nan if loss is None else loss for loss in column]
                    for column in zip(*(curve.losses[1:] for curve in found), strict=True)
                ]
                seconds = [clock(timing, method, step) for step in found[0].at[1:]]
                mean = [sum(column) / len(column) for column in columns]
                (line,) = axes.plot(seconds, mean, label=LABELS[method], linewidth=1.2)
                low, high = [min(column) for column in columns], [max(column) for column in columns]
                axes.fill_between(seconds, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
            axes.set_title(f"{rate}, {computation(sleep)}", fontsize="medium")
            axes.set(xlabel="seconds of training", xscale="log")
            low_end, high_end = axes.get_xlim()
            ticks = [tick for tick in TICKS if low_end <= tick <= high_end]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("held-out loss, nats per byte")
    panels[0][0].legend()
    figure.savefig(path, dpi=110)
