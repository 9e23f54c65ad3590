"""Held-out loss against seconds of training on slow links, by majority vote and by AdamW: see README.md.

    python bench/time_to_loss.py --out signvote-bench

It trains the model of `signvote demo`. Everything measured is kept in OUT/time_to_loss.json after each piece, and the
same command goes on from there: with `--stop-after 70` each call takes about two minutes. Needs root and iproute2, as
netlab.py does.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import netlab
from ddp.launch import RankError, run_ranks
from ddp.training import BLOCK, PLAIN_STEPS, RANK, Curve, Run, Timing, Turns
from signvote.cli.bench.machine import load, machine, versions
from signvote.cli.bench.measure import Spread

FORMAT = 1
LABELS = {
    "noop": "no exchange",
    "vote": "majority vote",
    "fp32": "AdamW, fp32",
    "fp16": "AdamW, fp16 hook",
    "powersgd": f"AdamW, PowerSGD {RANK}",
}
METHODS = [name for name in LABELS if name != "noop"]
COMPARED = ("vote", "fp32")  # what the bar speaks of; trained on the links in full
# The same grid for all, around what `signvote demo` has; where the best is at its end, it grows.
FACTORS = (0.25, 0.5, 1.0, 2.0)
DEMO_LR = {"vote": 2e-3, "fp32": 4e-3, "fp16": 4e-3, "powersgd": 4e-3}
MOST_SETTINGS = 7
TUNING_SEED = 1000
BAR = 5.0  # times sooner than fp32 at 100 Mb/s
TICKS = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]  # seconds, in the plot


@dataclass
class Store:
    """What has been measured so far."""

    curves: list[Curve] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    pieces: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Store:
        if not path.exists():
            return cls()
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("format") != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT}, got {document.get('format')}")
        store = cls(pieces=document["pieces"])
        for kind in ("curves", "timings"):
            for fields in document[kind]:
                store.add(fields)
        return store

    def add(self, fields: dict[str, Any]) -> None:
        if "run" in fields:
            self.curves.append(Curve(**{**fields, "run": Run(**fields["run"])}))
        else:
            self.timings.append(Timing(**{**fields, "turns": Turns(**fields["turns"])}))

    def write(self, path: Path, **more: Any) -> None:
        kinds = {kind: [asdict(one) for one in getattr(self, kind)] for kind in ("curves", "timings")}
        document = {"format": FORMAT, **more, "pieces": self.pieces, **kinds}
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(path)

    def curve(self, run: Run) -> Curve | None:
        return next((curve for curve in self.curves if curve.run == run), None)

    def timing(self, turns: Turns) -> Timing | None:
        return next((timing for timing in self.timings if timing.turns == turns), None)


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    workers: int
    steps: int
    every: int
    seeds: tuple[int, ...]
    rates: tuple[str, ...]
    sleep: float
    rounds: int
    tuned: bool

    def turns(self, rate: str, sleep: float) -> Turns:
        return Turns(list(LABELS), self.workers, sleep, self.rounds, rate)

    def tuning(self, method: str, lr: float) -> Run:
        steps = max(1, self.steps // 2)
        return Run(method, lr, TUNING_SEED, self.workers, steps, steps, "tuning", "none")

    def training(self, method: str, lr: float, seed: int, rate: str = "none") -> Run:
        return Run(method, lr, seed, self.workers, self.steps, self.every, "held-out", rate)

    def batches(self, store: Store) -> Iterator[tuple[str, list[Run], list[Turns]]]:
        """Rates, and what is missing on links of it; each from what the batches before have given."""
        for rate in self.rates:
            yield rate, [], [self.turns(rate, sleep) for sleep in (0.0, self.sleep)]
        while True:
            runs = [self.tuning(method, lr) for method in METHODS for lr in self.learning_rates(method, store)]
            if all(store.curve(run) for run in runs):
                break
            yield "none", runs, []
        best = {method: self.best(method, store) for method in METHODS}
        yield "none", [self.training(method, best[method], seed) for seed in self.seeds for method in METHODS], []
        for rate in self.rates:
            yield rate, [self.training(method, best[method], self.seeds[0], rate) for method in COMPARED], []

    def tried(self, method: str, store: Store) -> dict[float, float]:
        """The loss with each learning rate."""
        found = [curve for curve in store.curves if curve.run == self.tuning(method, curve.run.lr)]
        return {curve.run.lr: math.inf if curve.losses[-1] is None else curve.losses[-1] for curve in found}

    def learning_rates(self, method: str, store: Store) -> list[float]:
        """The grid, and beyond its end while the best is there."""
        if not self.tuned:
            return []
        grid = [factor * DEMO_LR[method] for factor in FACTORS]
        tried = self.tried(method, store)
        grid += sorted(set(tried) - set(grid))
        if set(grid) <= set(tried) and len(grid) < MOST_SETTINGS:
            best = min(grid, key=lambda lr: tried[lr])
            if best == max(grid):
                grid.append(2 * best)
            elif best == min(grid):
                grid.append(best / 2)
        return grid

    def best(self, method: str, store: Store) -> float:
        if not self.tuned:
            return DEMO_LR[method]
        tried = self.tried(method, store)
        return min(tried, key=lambda lr: tried[lr])


def launch(rate: str, runs: list[Run], turns: list[Turns], stop_after: float, store: Store) -> None:
    """Measure these, and keep what was done before the time was over or a rank failed."""
    (workers,) = {run.workers for run in runs} | {one.workers for one in turns}
    with tempfile.TemporaryDirectory(prefix="time-to-loss-") as folder, netlab.Lab(workers, rate) as lab:
        job, found = Path(folder, "job.json"), Path(folder, "results.jsonl")
        tasks = {"runs": [asdict(run) for run in runs], "turns": [asdict(one) for one in turns]}
        job.write_text(json.dumps({**tasks, "stop_after": stop_after}), encoding="utf-8")
        try:
            run_ranks(lab, "training", job, found)
        finally:
            if found.exists():
                for line in found.read_text(encoding="utf-8").splitlines():
                    store.add(json.loads(line))


def measure(plan: Plan, store: Store, path: Path, stop_after: float) -> bool:
    """Measure what is missing; whether all is there now."""
    begin = time.perf_counter()
    for rate, all_runs, all_turns in plan.batches(store):
        runs = [run for run in all_runs if store.curve(run) is None]
        turns = [one for one in all_turns if store.timing(one) is None]
        left = stop_after - (time.perf_counter() - begin)
        if not runs and not turns:
            continue
        if left <= 0.0:
            return False
        print(f"{rate}: {len(runs)} trainings and {len(turns)} timings to do", flush=True)
        before = load()
        piece = {"when": datetime.now(timezone.utc).isoformat(timespec="seconds"), "rate": rate, "load_before": before}
        try:
            launch(rate, runs, turns, left, store)
        finally:
            store.pieces.append({**piece, "load_after": load()})
            store.write(path)
        if not (all(map(store.curve, runs)) and all(map(store.timing, turns))):
            return False
    return True


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
    plain = min(steps, PLAIN_STEPS) if method == "powersgd" else 0.0
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


def main(argv: Sequence[str] | None = None) -> int:
    found = parser()
    options = found.parse_args(argv)
    plan = Plan(
        options.workers,
        options.steps,
        options.every,
        tuple(options.seeds),
        tuple(options.rate),
        options.sleep,
        options.rounds,
        not options.no_tuning,
    )
    path = options.out / "time_to_loss.json"
    try:
        store = Store.read(path)
        done = measure(plan, store, path, options.stop_after)
    except (netlab.NetlabError, RankError, TimeoutError) as error:
        print(f"time_to_loss: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        found.error(str(error))
    except KeyboardInterrupt:
        return 130
    if not done:
        print(f"Not all is measured; the same command goes on from {path}.")
        return 0
    print(f"\n{report(plan, store)}\n")
    facts = {"machine": machine(), "versions": versions(), "plan": asdict(plan), "block": BLOCK}
    results = {
        "times": [asdict(one) for one in times(plan, store)],
        "checks": [asdict(one) for one in checks(plan, store)],
    }
    best = {method: plan.best(method, store) for method in METHODS}
    store.write(path, **facts, learning_rates=best, **results)
    plot = options.out / "time_to_loss.png"
    write_plot(plot, plan, store)
    print(f"Written: {path}, {plot}")
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--workers", type=positive, default=4, metavar="M", help="[4]")
    add("--steps", type=positive, default=200, metavar="N", help="of a training; half as many for tuning [200]")
    add("--every", type=positive, default=10, metavar="N", help="steps between two measurements of the loss [10]")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the model, the batches and the coins [0 1 2]")
    add("--rate", nargs="+", default=["1gbit", "100mbit"], help="of the links, as netlab.py takes them [1gbit 100mbit]")
    add("--sleep", type=seconds, default=0.02, metavar="S", help="of a step that sleeps instead of computing [0.02]")
    add("--rounds", type=positive, default=8, metavar="N", help=f"samples of {BLOCK} steps, of each method [8]")
    add("--no-tuning", action="store_true", help="take the demo's learning rates")
    add("--stop-after", type=float, default=math.inf, metavar="S", help="begin nothing after that many seconds")
    add("--out", type=Path, default=Path("signvote-bench"), metavar="DIR", help="for time_to_loss.{json,png}")
    return found


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def seconds(text: str) -> float:
    number = float(text)
    if not 0.0 < number < 60.0:
        raise argparse.ArgumentTypeError(f"expected more than 0 and less than 60, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
