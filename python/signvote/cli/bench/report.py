"""What a person reads: the table of all results, the bars, and what changed between two runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
    with_peers = [name for name in ("numpy", "torch") if any(name in op.ratios for op in ops)]
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
    return _align(rows, left=(0, 3))


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
    lines = _align(rows, left=(0, 5, 6), skip="# ").splitlines()
    return "\n".join(line.removeprefix("# ") for line in lines)


def summary(bars: Sequence[Bar]) -> str:
    met = sum(bar.met for bar in bars)
    unsure = sum(not bar.sure for bar in bars)
    doubt = f"; at {unsure} (marked ?) the quartiles lie on both sides of the bar" if unsure else ""
    return f"{met} of {len(bars)} bars are met{doubt}."


def _figure(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _align(rows: Iterable[list[str] | None], left: Sequence[int], skip: str | None = None) -> str:
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
    """What changed by more than the noise, the surest change first.

    Ops are compared by their ratio to the limit, so that a machine that is slower today changes nothing; limits and
    peers by their time.
    """
    before = {result.key: result for result in old}
    pairs = [(before[result.key], result) for result in new if result.key in before]
    if not pairs:
        return "The two runs have nothing in common."
    changes = []
    for was, now in pairs:
        (what, first, second) = _compared(was, now)
        factor = second.median / first.median
        noise = math.hypot(_relative(first), _relative(second), RUN_NOISE)
        changes.append((abs(math.log(factor)) / noise, factor, noise, now, what, first, second))
    changed = sorted((change for change in changes if change[0] > 1), key=lambda change: -change[0])
    lines = [f"{len(changed)} of {len(pairs)} results changed by more than the noise."]
    rows: list[list[str] | None] = [["", "", "before", "now", "change", "noise", "change / noise"], None]
    for times, factor, noise, now, what, first, second in changed:
        verdict = "better" if (factor > 1) == (what == "of the limit") else "worse"
        rows.append(
            [
                now.label(),
                what,
                _significant(first.median),
                _significant(second.median),
                f"{factor - 1:+.0%} {verdict}",
                f"{noise:.0%}",
                f"{times:.1f}",
            ]
        )
    if changed:
        lines.append(_align(rows, left=(0, 1)))
    return "\n".join(lines)


def _compared(was: Result, now: Result) -> tuple[str, Spread, Spread]:
    if "limit" in was.ratios and "limit" in now.ratios:
        return "of the limit", was.ratios["limit"], now.ratios["limit"]
    return "ms", _milliseconds(was.seconds), _milliseconds(now.seconds)


def _milliseconds(seconds: Spread) -> Spread:
    return Spread(seconds.median * 1e3, seconds.low * 1e3, seconds.high * 1e3)


def _relative(spread: Spread) -> float:
    return (spread.high - spread.low) / spread.median


def _significant(value: float) -> str:
    return f"{value:.3g}"
