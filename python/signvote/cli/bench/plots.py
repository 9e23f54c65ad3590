"""Two plots: bandwidth against size, and votes against the number of workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from signvote.cli.bench.results import Result

COLOURS = {"avx512": "tab:blue", "avx2": "tab:orange", "neon": "tab:blue", "portable": "tab:green"}
PEERS = {"numpy": "tab:red", "torch": "tab:purple"}
PANELS = (
    ("pack_signs", "none", "read", "pack_signs"),
    ("pack_signs", "third", "read", "pack_signs, a third zeros"),
    ("pack_momentum", "none", "update", "pack_momentum"),
    ("unpack_signs", "none", "write", "unpack_signs"),
)


def write(folder: Path, results: Sequence[Result], machine: str) -> list[Path]:
    """Those for which there are results."""
    written = []
    if any(r.op in ("pack_signs", "pack_momentum", "unpack_signs") and r.dtype == "float32" for r in results):
        written.append(folder / "bandwidth.png")
        write_bandwidth(written[-1], results, machine)
    if any(r.op == "majority_vote" for r in results):
        written.append(folder / "votes.png")
        write_votes(written[-1], results, machine)
    return written


def write_bandwidth(path: Path, results: Sequence[Result], machine: str) -> None:
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (op, zeros, limit, title) in zip(panels, PANELS, strict=True):
        some = [r for r in results if (r.op, r.zeros, r.dtype, r.threads) == (op, zeros, "float32", 1)]
        _limit_line(axes, [r for r in some if r.name == limit], _megabytes, "limit: a plain loop")
        for name, line in _by_name(some, "op"):
            _line(axes, line, _megabytes, name, COLOURS.get(name, "black"))
        for name, line in _by_name(some, "peer"):
            _line(axes, line, _megabytes, name, PEERS[name], "--")
        axes.set(title=title, xlabel="MB of float32", xscale="log")
        sizes = sorted({r.megabytes for r in some})
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="GB/s, one thread", ylim=(0, None))
    panels[0].legend(fontsize="small")
    figure.suptitle(f"Bandwidth of the ops, {machine}", fontsize="medium")
    figure.savefig(path, dpi=120)


def write_votes(path: Path, results: Sequence[Result], machine: str) -> None:
    votes = [r for r in results if r.op == "majority_vote" and r.threads == 1]
    size = min({r.megabytes for r in votes}, key=lambda megabytes: abs(megabytes - 26))
    votes = [r for r in votes if r.megabytes == size]
    ticks = sorted({r.rows for r in votes if r.rows is not None})
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    linear, logarithmic = figure.subplots(1, 2)
    for axes in (linear, logarithmic):
        axes.set(xlabel="workers M", ylabel="GB/s of words read and written")
        axes.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
        axes.grid(alpha=0.3)

    def place(result: Result) -> float:
        return ticks.index(result.rows or 0)

    for name, line in _by_name(votes, "op"):
        if name != "portable":
            _line(linear, line, place, name, COLOURS.get(name, "black"))
        _line(logarithmic, line, place, name, COLOURS.get(name, "black"))
    for name, label, style in (
        ("xor_rows", "limit: XOR of the rows", "--"),
        ("read_rows_then_write", "limit: read the rows, then write", ":"),
    ):
        _limit_line(linear, [r for r in votes if r.name == name], place, label, style)
    for name, line in _by_name(votes, "peer"):
        _line(logarithmic, line, place, name, PEERS[name], "--")
    linear.set(ylim=(0, None), title="against the limits")
    logarithmic.set(yscale="log", title="against numpy and torch")
    linear.legend()
    logarithmic.legend()
    figure.suptitle(f"majority_vote on the words of {size:g} MB of float32, one thread, {machine}", fontsize="medium")
    figure.savefig(path, dpi=120)


def _by_name(results: Sequence[Result], kind: str) -> list[tuple[str, list[Result]]]:
    names = dict.fromkeys(r.name for r in results if r.kind == kind)
    return [(name, [r for r in results if (r.kind, r.name) == (kind, name)]) for name in names]


Place = Callable[[Result], float]


def _line(axes: Axes, line: Sequence[Result], place: Place, label: str, colour: str, style: str = "-") -> None:
    line = sorted(line, key=place)
    places = [place(r) for r in line]
    axes.plot(places, [r.gigabytes_per_second for r in line], style, marker=".", label=label, color=colour)
    low = [r.bytes / r.seconds.high * 1e-9 for r in line]
    high = [r.bytes / r.seconds.low * 1e-9 for r in line]
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def _limit_line(axes: Axes, line: Sequence[Result], place: Place, label: str, style: str = "--") -> None:
    line = sorted(line, key=place)
    places = [place(r) for r in line]
    axes.plot(places, [r.gigabytes_per_second for r in line], style, label=label, color="black", linewidth=2)


def _megabytes(result: Result) -> float:
    return result.megabytes
