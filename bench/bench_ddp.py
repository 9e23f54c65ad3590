"""How long exchanges and DDP steps take on slow links, by majority vote and by what torch offers: see README.md.

python bench/bench_ddp.py --quick   # the bars, in less than 4 minutes
python bench/bench_ddp.py           # all of it; needs root and iproute2, as netlab.py does
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import netlab
from ddp import report, results
from ddp.calibration import WORKERS as CALIBRATION_WORKERS
from ddp.calibration import Calibration
from ddp.estimate import launch_seconds
from ddp.launch import RankError, run_ranks
from ddp.methods import METHODS
from ddp.predictions import with_predictions
from ddp.results import Job, Measurement, Work
from signvote.cli.bench.machine import load, machine, versions
from signvote.cli.bench.measure import MIN_ROUNDS

WORKERS = (2, 4, 8)
RATES = ("none", "1gbit", "100mbit")
SIZES = (100_000, 1_000_000, 26_000_000)
SECONDS = 3.0  # that the methods of a workload take turns, if their fewest runs do not take longer
LONGEST_EXCHANGE, LONGEST_STEP = 14.0, 6.5  # seconds; what takes longer by its bytes is skipped
ROUNDS = 5  # the fewest; of the bars' figures MIN_ROUNDS
# Of whole steps; for the sake of time, with other numbers of workers than 4 a few only, and none computed here.
STEP_METHODS = (
    *("noop", "fp32", "fp16", "powersgd-1", "powersgd-4"),
    *("sharded/0", "sharded/0.9", "allgather/0.9", "server/0.9"),
)
FEW_WORKLOADS = ("exchange", "sleep")
FEW_STEP_METHODS = ("noop", "fp32", "fp16", "sharded/0.9")
QUICK_METHODS = ("noop", "fp32", "fp16", "sharded/0", "sharded/0.9")

Launch = tuple[int, str, list[Work]]


def main(argv: Sequence[str] | None = None) -> int:
    found = parser()
    options = found.parse_args(argv)
    if options.quick and any((options.workers, options.rate, options.work, options.size, options.method)):
        found.error("argument --quick: expected without --workers, --rate, --work, --size and --method: it has its own")
    out = options.out or (None if options.quick else Path("signvote-bench"))
    facts: dict[str, Any] = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "load_before": load(),
    }
    cpu = f"{facts['machine']['cpu']}, {facts['machine']['cpus']} CPUs"
    print(cpu, ", ".join(f"{name} {version}" for name, version in versions().items()), sep="\n", flush=True)
    begin = time.perf_counter()
    measured: list[Measurement] = []
    status = 0
    try:
        todo = list(launches(options))
        for _, rate, _ in todo:
            netlab.parse_rate(rate)  # a bad one is named before anything runs
        calibration = calibrate()
        facts["calibration"] = calibration.as_dict()
        expected = [launch_seconds(*one, calibration) for one in todo]
        print(f"About {sum(expected) / 60:.1f} minutes in {len(todo)} launches.", flush=True)
        for done, (workers, rate, works) in enumerate(todo):
            left = sum(expected[done:])
            progress(f"{time.perf_counter() - begin:.0f} s: M={workers}, {rate}; about {left:.0f} s left")
            launch(workers, rate, works, calibration, measured)
    except (netlab.NetlabError, RankError, TimeoutError) as error:
        print(f"bench_ddp: {error}", file=sys.stderr)
        status = 1  # what there is until then is shown
    except ValueError as error:
        found.error(str(error))
    except KeyboardInterrupt:
        return 130
    facts |= {"seconds": round(time.perf_counter() - begin, 1), "load_after": load()}
    if measured:
        bars = report.judge(measured)
        print(f"\n{report.table(measured)}\n")
        if bars:
            print(f"{report.bars_table(bars)}\n")
        print(f"{len(measured)} results, all checked before they were timed, in {facts['seconds']:.0f} s.")
        write_files(out, options.json, facts, measured, cpu)
    return status


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--quick", action="store_true", help="only what the bars need; no files unless asked")
    add("--workers", nargs="+", type=int, metavar="M", help=f"numbers of workers {list(WORKERS)}")
    add("--rate", nargs="+", metavar="RATE", help=f"of the links, as netlab.py takes them {list(RATES)}")
    add(
        "--work",
        nargs="+",
        choices=list(report.WORKLOADS),
        metavar="WORK",
        help="only these of exchange, sleep, cpu, demo",
    )
    add("--size", nargs="+", type=float, metavar="D", help=f"coordinates of the exchange {list(SIZES)}")
    add("--method", nargs="+", choices=METHODS, metavar="METHOD", help=f"only these of {', '.join(METHODS)}")
    add(
        "--seconds",
        type=float,
        default=SECONDS,
        help=f"for each workload, if its fewest runs are shorter [{SECONDS:g}]",
    )
    add(
        "--longest",
        type=float,
        metavar="S",
        help="skip what takes longer, by its bytes, for one run "
        f"[exchange {LONGEST_EXCHANGE:g}, step {LONGEST_STEP:g}]",
    )
    add("--json", type=Path, metavar="PATH", help="write the results there")
    add("--out", type=Path, metavar="DIR", help="folder for ddp.json and ddp.png [signvote-bench]")
    return found


def launches(options: argparse.Namespace) -> Iterator[Launch]:
    """Which workers, links and workloads, in which order."""
    if options.quick:
        sizes = [1_000_000, 26_000_000]
        yield 4, "1gbit", [work(options, "exchange", size, QUICK_METHODS[1:]) for size in sizes]
        yield 4, "1gbit", [work(options, kind, 0, QUICK_METHODS) for kind in ("sleep", "cpu")]
        for workers in (2, 8):
            yield workers, "1gbit", [work(options, "exchange", 1_000_000, ("sharded/0",))]
        return
    # "auto" is one of the others for each size.
    exchange_methods = [name for name in METHODS if name != "noop" and not name.startswith("auto/")]
    for rate in options.rate or RATES:
        for workers in options.workers or WORKERS:
            step_methods = STEP_METHODS if workers == 4 else FEW_STEP_METHODS
            works = []
            for kind in options.work or (report.WORKLOADS if workers == 4 else FEW_WORKLOADS):
                if kind == "exchange":
                    sizes = [int(size) for size in options.size or SIZES]
                    works += [work(options, kind, size, options.method or exchange_methods) for size in sizes]
                else:
                    works.append(work(options, kind, 0, options.method or step_methods))
            yield workers, rate, works


def work(options: argparse.Namespace, kind: str, size: int, methods: Sequence[str]) -> Work:
    longest = LONGEST_EXCHANGE if kind == "exchange" else LONGEST_STEP
    rounds = MIN_ROUNDS if options.quick else ROUNDS
    return Work(kind, size, list(methods), options.seconds, options.longest or longest, rounds)


def calibrate() -> Calibration:
    with tempfile.TemporaryDirectory(prefix="bench-ddp-") as folder, netlab.Lab(CALIBRATION_WORKERS) as lab:
        found = Path(folder, "calibration.json")
        run_ranks(lab, "calibration", found)
        return Calibration.read(found)


def launch(workers: int, rate: str, works: list[Work], calibration: Calibration, measured: list[Measurement]) -> None:
    """Measure on ``workers`` hosts; what was done before one failed, or the time was over, is kept."""
    with tempfile.TemporaryDirectory(prefix="bench-ddp-") as folder, netlab.Lab(workers, rate) as lab:
        job, found = Path(folder, "job.json"), Path(folder, "results.json")
        Job(works, rate, lab.bits_per_second).write(job)
        try:
            run_ranks(lab, "worker", job, found)
        finally:
            if found.exists():
                measured += with_predictions(results.read(found), calibration)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def write_files(
    out: Path | None, json_path: Path | None, facts: dict[str, Any], measured: Sequence[Measurement], cpu: str
) -> None:
    written = []
    for path in (json_path, out and out / "ddp.json"):
        if path is not None:
            results.write(path, measured, **facts)
            written.append(path)
    if out is not None and find_spec("matplotlib") is None:
        print("bench_ddp: no plot without matplotlib: pip install 'signvote[bench]'", file=sys.stderr)
    elif out is not None:
        from ddp import plots  # it imports the extra

        written.append(out / "ddp.png")
        plots.write(written[-1], measured, cpu)
    if written:
        print(f"Written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    sys.exit(main())
