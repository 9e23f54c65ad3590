"""What a person reads: the table of all results, the bars, and what changed between two runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from signvote.cli.bench.bars import LIMITS, Bar
from signvote.cli.bench.measure import Spread
from signvote.cli.bench.results import Result

# Two runs of the same code differ by about this much where the samples of each agree better than that: pages and
# neighbours are others.
RUN_NOISE = 0.03


def table(results: Sequence[Result]) -> str:
    """One line for each op, grouped, with the limits below those they belong to."""
    ops = [result for result in results if result.kind == "op"]
    with_peers = [name for name in ("numpy", "torch", "cupy") if any(name in op.ratios for op in ops)]
    threads = ["1 thread"] if any(op.threads > 1 for op in ops) else []
    header = ["", "MB", "threads", "", "GB/s", "ns/coord.", "of the limit", "quartiles"]
    header += [f"/ {name}" for name in (*with_peers, *threads)]
    rows: list[list[str] | None] = [header]
    for _, group in groupby(results, lambda result: (result.op, result.zeros)):
        rows.append(None)
        for result in group:
            if result.kind == "peer":
                continue
            cells = [_what(result), f"{result.megabytes:g}", str(result.threads), _who(result)]
            cells += [f"{result.gigabytes_per_second:.1f}", f"{result.nanoseconds_per_coordinate:.4f}"]
            limit = result.ratios.get("limit")
            cells += [f"{limit.median:.2f}", f"{limit.low:.2f}-{limit.high:.2f}"] if limit else ["", ""]
            for name in (*with_peers, *(["one thread"] if threads else [])):
                cells.append(_times(result.ratios.get(name)))
            rows.append(cells)
    return align(rows, left=(0, 3))


def _what(result: Result) -> str:
    zeros = " zeros" if result.zeros == "third" else ""
    return f"{result.op} M={result.rows}" if result.rows else f"{result.op} {result.dtype}{zeros}"


def _who(result: Result) -> str:
    return f"({LIMITS[result.name]})" if result.kind == "limit" else result.name


def _times(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.median:.0f}" if spread.median >= 10 else f"{spread.median:.1f}"


def bars_table(bars: Sequence[Bar]) -> str:
    """One line for each bar, sizes side by side would hide the spread."""
    rows: list[list[str] | None] = [["", "MB", "measured", "quartiles", "bar", "met", ""]]
    lines: list[str] = []
    for group, some in groupby(bars, lambda bar: bar.group):
        rows.append([f"# {group}", *[""] * 6])
        for bar in some:
            quartiles = f"{_figure(bar.measured.low)}-{_figure(bar.measured.high)}"
            met = ("yes" if bar.met else "NO") + ("" if bar.sure else " ?")
            cells = [f"  {bar.what}", f"{bar.megabytes:g}", _figure(bar.measured.median), quartiles, f"{bar.least:g}"]
            rows.append([*cells, met, bar.note])
    lines = align(rows, left=(0, 5, 6), skip="# ").splitlines()
    return "\n".join(line.removeprefix("# ") for line in lines)


def summary(bars: Sequence[Bar]) -> str:
    met = sum(bar.met for bar in bars)
    unsure = sum(not bar.sure for bar in bars)
    doubt = f"; at {unsure} (marked ?) the quartiles lie on both sides of the bar" if unsure else ""
    return f"{met} of {len(bars)} bars are met{doubt}."


def _figure(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def align(rows: Iterable[list[str] | None], left: Sequence[int], skip: str | None = None) -> str:
    """Columns of equal width; None is a line across. A row that begins with ``skip`` may be as wide as it likes."""
    rows = list(rows)
    counted = [row for row in rows if row is not None and not (skip and row[0].startswith(skip))]
    widths = [max(map(len, column)) for column in zip(*counted, strict=True)]
    lines = []
    for row in rows:
        if row is None:
            lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
            continue
        cells = [row[i].ljust(width) if i in left else row[i].rjust(width) for i, width in enumerate(widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def compare(old: Sequence[Result], new: Sequence[Result]) -> str:
    """Which ops changed by more than the noise, the surest change first.

    They are compared by their ratio to the limit, so that a machine that is slower today changes nothing. How many of
    the limits and peers changed says how much the machine did.
    """
    before = {result.key: result for result in old}
    pairs = [(before[result.key], result) for result in new if result.key in before]
    ops = [Change(now, was.ratios["limit"], now.ratios["limit"]) for was, now in pairs if now.kind == "op"]
    others = [Change(now, was.seconds, now.seconds) for was, now in pairs if now.kind != "op"]
    if not ops:
        return "The two runs have no op in common."
    changed = sorted((change for change in ops if change.times > 1), key=lambda change: -change.times)
    lines = [f"{len(changed)} of {len(ops)} ops changed by more than the noise."]
    if changed:
        rows: list[list[str] | None] = [["of the limit", "before", "now", "change", "noise", "change / noise"], None]
        for change in changed:
            verdict = "faster" if change.factor > 1 else "slower"
            cells = [change.now.label(), f"{change.before.median:.2f}", f"{change.after.median:.2f}"]
            rows.append([*cells, f"{change.factor - 1:+.0%} {verdict}", f"{change.noise:.0%}", f"{change.times:.1f}"])
        lines.append(align(rows, left=(0,)))
    moved = sum(change.times > 1 for change in others)
    lines.append(f"{moved} of {len(others)} limits and peers take another time: that is the machine, not the ops.")
    return "\n".join(lines)


@dataclass(frozen=True)
class Change:
    now: Result
    before: Spread
    after: Spread

    @property
    def factor(self) -> float:
        return self.after.median / self.before.median

    @property
    def noise(self) -> float:
        """The quartile distances of both runs, and what differs from run to run."""
        return math.hypot(_relative(self.before), _relative(self.after), RUN_NOISE)

    @property
    def times(self) -> float:
        """How many times the noise."""
        return abs(math.log(self.factor)) / self.noise


def _relative(spread: Spread) -> float:
    return (spread.high - spread.low) / spread.median
