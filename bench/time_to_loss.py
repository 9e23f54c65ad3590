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
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import netlab
from ddp import loss_report
from ddp.launch import RankError, run_ranks
from ddp.training import BLOCK, Run, Turns
from ddp.trainings import METHODS, Plan, Store
from signvote.cli.bench.machine import load


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
    print(f"\n{loss_report.report(plan, store)}\n")
    facts = {"plan": asdict(plan), "block": BLOCK}
    results = {
        "times": [asdict(one) for one in loss_report.times(plan, store)],
        "checks": [asdict(one) for one in loss_report.checks(plan, store)],
    }
    best = {method: plan.best(method, store) for method in METHODS}
    store.write(path, **facts, learning_rates=best, **results)
    plot = options.out / "time_to_loss.png"
    loss_report.write_plot(plot, plan, store)
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
