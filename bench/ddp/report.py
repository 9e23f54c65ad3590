"""What a person reads: the table of all measurements, and the bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ddp.methods import ring
from ddp.results import Measurement
from signvote.cli.bench.measure import Spread
from signvote.cli.bench.report import align

WORKLOADS = {
    "exchange": "exchange of one bucket",
    "sleep": "DDP step, computation simulated by sleeping",
    "cpu": "DDP step, computed on this CPU",
    "demo": "DDP step of the demo's transformer",
}


PREDICTION_BOUND = 0.25
FEWEST_FOR_QUARTILES = 3  # samples


@dataclass(frozen=True)
class Column:
    """Of the table. It is left out where it has nothing to say."""

    header: str
    cell: Callable[[Measurement], str]


def _times(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3g}"


def _than(name: str) -> Callable[[Measurement], str]:
    return lambda one: _times(one.times_faster.get(name))


def _milliseconds(one: Measurement) -> str:
    return one.skipped or "" if one.seconds is None else f"{1e3 * one.seconds.median:.1f}"


def _quartiles(one: Measurement) -> str:
    if one.seconds is None:
        return ""
    return _few(one.samples) or f"{1e3 * one.seconds.low:.1f}-{1e3 * one.seconds.high:.1f}"


def _few(samples: int) -> str:
    """What to say in place of quartiles, if there are too few samples for any."""
    return "" if samples >= FEWEST_FOR_QUARTILES else f"{samples} run{'s' * (samples != 1)}"


def _payload(one: Measurement) -> float:
    return max(one.payload_sent, one.payload_received)


def _link(one: Measurement) -> str:
    return "" if one.seconds is None else f"{1e-6 * max(one.link_sent, one.link_received):.3f}"


def _floor(one: Measurement) -> str:
    return "" if one.floor is None or one.floor == 0 else f"{1e3 * one.floor:.1f}"


def _of_floor(one: Measurement) -> str:
    return "" if one.seconds is None or not one.floor else f"{one.floor / one.seconds.median:.2f}"


def _predicted(one: Measurement) -> str:
    return "" if one.predicted is None else f"{1e3 * one.predicted:.1f}"


def _of_measured(one: Measurement) -> str:
    return "" if one.predicted is None or one.seconds is None else f"{one.predicted / one.seconds.median:.2f}"


COLUMNS = (
    Column("", lambda one: f"  {one.method}"),
    Column("ms", _milliseconds),
    Column("quartiles", _quartiles),
    Column("predicted ms", _predicted),
    Column("/ ms", _of_measured),
    Column("x noop", lambda one: _times(one.times_noop)),
    Column("/ fp32", _than("fp32")),
    Column("/ fp16", _than("fp16")),
    Column("/ powersgd-1", _than("powersgd-1")),
    Column("/ powersgd-4", _than("powersgd-4")),
    Column("payload MB", lambda one: f"{1e-6 * _payload(one):.3f}"),
    Column("on the link", _link),
    Column("floor ms", _floor),
    Column("floor / ms", _of_floor),
)


def table(measurements: Sequence[Measurement], columns: Sequence[Column] = COLUMNS) -> str:
    """One line for each method, grouped by workload, workers and rate."""
    columns = [column for column in columns if any(map(column.cell, measurements))]
    rows: list[list[str] | None] = [[column.header for column in columns]]
    for _, group in groupby(measurements, lambda one: (one.workload, one.coordinates, one.workers, one.rate)):
        lines = list(group)
        rows.append([f"# {_title(lines)}", *[""] * (len(columns) - 1)])
        rows += [[column.cell(one) for column in columns] for one in lines]
    text = align(rows, left=(0,), skip="# ")
    return "\n".join(line.removeprefix("# ") for line in text.splitlines())


def _title(lines: Sequence[Measurement]) -> str:
    one = lines[0]
    most = max(len(line.buckets) for line in lines)
    buckets = f" in {most} buckets" if most > 1 else ""
    rate = "unlimited" if one.rate == "none" else one.rate
    return f"{WORKLOADS[one.workload]}, {one.coordinates:,} coordinates{buckets}, M={one.workers}, {rate}"


@dataclass(frozen=True)
class Bar:
    what: str
    measured: Spread
    bound: float
    at_least: bool
    samples: int | None = None  # None: it does not vary

    @property
    def met(self) -> bool:
        return self.measured.median >= self.bound if self.at_least else self.measured.median <= self.bound

    @property
    def sure(self) -> bool:
        """The quartiles lie on one side."""
        if self.samples is not None and _few(self.samples):
            return False
        return (self.measured.low >= self.bound) == (self.measured.high >= self.bound)


def judge(measurements: Sequence[Measurement]) -> list[Bar]:
    """Those that the measurements can answer."""
    measured = [one for one in measurements if one.seconds is not None]
    votes = [one for one in measured if one.method.startswith("sharded/")]
    return [*_bytes(votes), *_exchange(votes), *_steps(votes), *_growth(votes), *_predictions(measured)]


def _exactly(value: float) -> Spread:
    return Spread(value, value, value)


def _where(one: Measurement) -> str:
    return f"{one.method}, {one.coordinates / 1e6:.3g}M, M={one.workers}, {one.rate}"


def _predictions(measured: Sequence[Measurement]) -> Iterator[Bar]:
    """One for all: that of the worst."""
    errors = [(_error(one), one) for one in measured if one.predicted is not None]
    if not errors:
        return
    worst, one = max(errors, key=lambda pair: pair[0].median)
    within = sum(error.median <= PREDICTION_BOUND for error, _ in errors)
    which = f"worst of {len(errors)}, {within} are within {PREDICTION_BOUND:g}: {one.workload}, {_where(one)}"
    yield Bar(f"signvote plan, off the measured time by ({which})", worst, PREDICTION_BOUND, False, one.samples)


def _error(one: Measurement) -> Spread:
    """How far the prediction is off, as a part of what was measured."""
    assert one.predicted is not None
    assert one.seconds is not None
    seconds = one.seconds
    median, *others = (abs(one.predicted / part - 1) for part in (seconds.median, seconds.low, seconds.high))
    return Spread(median, min(median, *others), max(median, *others))


def _bytes(votes: Sequence[Measurement]) -> Iterator[Bar]:
    for one in votes:
        if one.workload == "exchange" and one.coordinates >= 1e6:
            least = ring(one.workers) * one.coordinates / 8
            where = _where(one)
            yield Bar(f"payload / (2(M-1)/M d/8): {where}", _exactly(_payload(one) / least), 1.01, False)
            link = max(one.link_sent, one.link_received)
            yield Bar(f"bytes on the link / the same: {where}", _exactly(link / least), 1.10, False)


def _exchange(votes: Sequence[Measurement]) -> Iterator[Bar]:
    for one in votes:
        if (one.workload, one.coordinates, one.workers, one.rate) != ("exchange", 26_000_000, 4, "1gbit"):
            continue
        for name, bound in (("fp32", 25), ("fp16", 13)):
            if name in one.times_faster:
                yield Bar(
                    f"exchange, times faster than {name}: {_where(one)}",
                    one.times_faster[name],
                    bound,
                    True,
                    one.samples,
                )
        if one.seconds is not None and one.floor is not None:
            seconds = one.seconds
            spread = Spread(*(one.floor / part for part in (seconds.median, seconds.high, seconds.low)))
            yield Bar(f"exchange, floor / time: {_where(one)}", spread, 0.6, True, one.samples)


def _steps(votes: Sequence[Measurement]) -> Iterator[Bar]:
    for one in votes:
        if one.times_noop is not None and (one.workers, one.rate) == (4, "1gbit"):
            bound = {"sleep": 1.15, "cpu": 1.4}.get(one.workload)
            if bound is not None:
                yield Bar(
                    f"{WORKLOADS[one.workload]}, / noop: {_where(one)}", one.times_noop, bound, False, one.samples
                )


def _growth(votes: Sequence[Measurement]) -> Iterator[Bar]:
    """From the fewest to the most workers the payload grows as 2(M-1)/M."""
    places = sorted({(one.workload, one.coordinates, one.method, one.rate) for one in votes})
    for place in places:
        same = [one for one in votes if (one.workload, one.coordinates, one.method, one.rate) == place]
        fewest, most = (which(same, key=lambda one: one.workers) for which in (min, max))
        if fewest.workers < most.workers and fewest.coordinates >= 1e6 and fewest.workload == "exchange":
            grown = (_payload(most) / ring(most.workers)) / (_payload(fewest) / ring(fewest.workers))
            what = f"payload's growth / that of 2(M-1)/M, M={fewest.workers} to {most.workers}: {place[2]}, {place[3]}"
            yield Bar(what, _exactly(grown), 1.01, False)


def bars_table(bars: Sequence[Bar]) -> str:
    rows: list[list[str] | None] = [["", "measured", "quartiles", "bar", "met"]]
    for bar in bars:
        spread = bar.measured
        quartiles = "" if bar.samples is None else _few(bar.samples) or f"{spread.low:.3g}-{spread.high:.3g}"
        met = ("yes" if bar.met else "NO") + ("" if bar.sure else " ?")
        bound = f"{'>=' if bar.at_least else '<='} {bar.bound:g}"
        rows.append([bar.what, f"{spread.median:.3g}", quartiles, bound, met])
    return align(rows, left=(0, 4))
