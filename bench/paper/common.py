"""What the experiments share: their result, the command line, tables, spreads, processes, PNG and JSON.

An experiment is a module of this folder with `run(quick: bool) -> Result`, and ends with

    if __name__ == "__main__":
        sys.exit(common.main(run, __doc__))
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from signvote.cli.bench.machine import machine, usable_cpus, versions
from signvote.cli.json_values import finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2)

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Result:
    """What an experiment found.

    Attributes:
        name: That of its module and of its files.
        title: Of its section.
        markdown: The section's text and tables, below the title and above the plot; no headings.
        figure: The plot, of :func:`new_figure`.
        data: All that was measured, and the settings and seeds, as JSON takes it; NaN and infinity become null.
    """

    name: str
    title: str
    markdown: str
    figure: Figure | None
    data: dict[str, Any]


# -- Command line and files -------------------------------------------------------------------------------------------


def main(run: Callable[[bool], Result], description: str | None, arguments: Sequence[str] | None = None) -> int:
    """Run one experiment, print its section, and write its PNG and JSON."""
    options = parser(description).parse_args(arguments)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    try:
        result = run(options.quick)
    except MissingPackageError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    print(f"{result.title}\n\n{result.markdown}\n")
    for path in write(result, options.out, quick=options.quick, seconds=time.perf_counter() - begin):
        print(f"Written: {path}")
    return 0


def parser(description: str | None, out: Path = Path("signvote-bench")) -> argparse.ArgumentParser:
    """With what every script here takes: --quick and --out."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help="a few seconds' worth: whether it runs, not what it finds")
    found.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"for what is written [{out}]")
    return found


def write(result: Result, folder: Path, *, quick: bool, seconds: float) -> list[Path]:
    """Write NAME.png and NAME.json to `folder`, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if result.figure is not None:
        written.append(folder / f"{result.name}.png")
        result.figure.savefig(written[-1], dpi=110)
    document = {
        "name": result.name,
        "title": result.title,
        "markdown": result.markdown,
        "plot": written[-1].name if written else None,
        "quick": quick,
        "seconds": round(seconds, 1),
        "machine": machine(),
        "versions": versions(),
        "data": finite(result.data),
    }
    written.append(folder / f"{result.name}.json")
    written[-1].write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")
    return written


class MissingPackageError(Exception):
    """An experiment needs a package of the extra `paper` that is not there."""


# -- Tables and plots -------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation (of a sample, so by n - 1) of values of several seeds."""
    if not all(map(math.isfinite, values)):
        return f"diverged in {sum(not math.isfinite(value) for value in values)} of {len(values)}"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def extent(values: Sequence[float], digits: int = 3) -> str:
    """Mean (least to most) of values of several seeds."""
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def listed(items: Sequence[object]) -> str:
    """`1, 2 and 3`."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; `figure.subplots(rows, columns)` gives its axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("needs matplotlib: pip install '.[paper]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# -- Processes --------------------------------------------------------------------------------------------------------


def each(function: Callable[[Job], Outcome], jobs: Sequence[Job]) -> list[Outcome]:
    """`[function(job) for job in jobs]`, on as many single-threaded processes as this one may use CPUs.

    `function` is at the top level of a module. What is computed does not depend on how many processes there are.
    """
    workers = min(usable_cpus(), len(jobs))
    if workers < 2:
        return [function(job) for job in jobs]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, jobs))
