"""One plot: seconds against workers, for each workload and rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ddp.report import WORKLOADS
from ddp.results import Measurement
from signvote.ddp.options import TOPOLOGIES

COLOURS = {
    "noop": "black",
    "fp32": "tab:red",
    "fp16": "tab:orange",
    "powersgd-1": "tab:purple",
    "powersgd-4": "tab:pink",
}
VOTES = dict(zip(TOPOLOGIES, ("tab:blue", "tab:green", "tab:cyan", "tab:olive"), strict=False))


def write(path: Path, measurements: Sequence[Measurement], machine: str) -> None:
    measured = [one for one in measurements if one.seconds is not None]
    rates = list(dict.fromkeys(one.rate for one in measured))
    largest = {one.workload: max(o.coordinates for o in measured if o.workload == one.workload) for one in measured}
    figure = Figure(figsize=(4.2 * len(rates), 3.6 * len(largest)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(largest), len(rates), sharey="row", squeeze=False)
    for row, (workload, coordinates) in zip(panels, largest.items(), strict=True):
        for axes, rate in zip(row, rates, strict=True):
            some = [o for o in measured if (o.workload, o.coordinates, o.rate) == (workload, coordinates, rate)]
            for method in dict.fromkeys(one.method for one in some):
                line = sorted((one for one in some if one.method == method), key=lambda one: one.workers)
                topology, _, momentum = method.partition("/")
                colour = COLOURS.get(method) or VOTES[topology]
                style = "--" if momentum == "0" else "-"
                workers = [one.workers for one in line]
                axes.plot(workers, [_median(one) for one in line], style, marker=".", color=colour, label=method)
            axes.set_yscale("log")
            ticks = sorted({one.workers for one in measured})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.set_title(f"{coordinates / 1e6:.3g}M coordinates, {'unlimited' if rate == 'none' else rate}")
            axes.grid(alpha=0.3, which="both")
        row[0].set_ylabel(f"{WORKLOADS[workload]}, s", fontsize="small")
    for axes in panels[-1]:
        axes.set_xlabel("workers M")
    panels[0][0].legend(fontsize="x-small")
    figure.suptitle(f"Exchanges and steps, {machine}", fontsize="medium")
    figure.savefig(path, dpi=110)


def _median(one: Measurement) -> float:
    assert one.seconds is not None
    return one.seconds.median
