"""What was measured, as it goes to the table, the bars, the plots and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from signvote.cli.bench.cases import Case
from signvote.cli.bench.measure import Contender, Spread, times_faster

FORMAT = 2


@dataclass(frozen=True)
class Result:
    """A contender of a case.

    Ratios say how many times faster it is: than the limit (at most about 1), a peer, another implementation, itself
    with one thread.
    """

    op: str
    dtype: str
    zeros: str
    rows: int | None
    megabytes: float
    coordinates: int
    kind: str
    name: str
    threads: int
    bytes: int
    seconds: Spread
    samples: int
    calls: int
    gigabytes_per_second: float
    nanoseconds_per_coordinate: float
    limit: str | None  # the fastest of the limits; ratios["limit"] is against it
    ratios: dict[str, Spread]

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.op, self.dtype, self.zeros, self.rows, self.megabytes, self.kind, self.name, self.threads)

    def label(self) -> str:
        parts = [self.op, f"M={self.rows}" if self.rows else self.dtype, f"{self.megabytes:g} MB"]
        if self.zeros == "third":
            parts.append("a third zeros")
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        return f"{' '.join(parts)}: {self.name}{threads}"


def results_of(case: Case, contenders: Sequence[Contender], size: int) -> list[Result]:
    return [_result(case, contender, contenders, size) for contender in contenders]


def _result(case: Case, contender: Contender, contenders: Sequence[Contender], size: int) -> Result:
    seconds = contender.spread()
    limit = None
    ratios: dict[str, Spread] = {}
    for other in contenders:
        if (other.kind, other.name, other.threads) == (contender.kind, contender.name, 1) and contender.threads > 1:
            ratios["one thread"] = times_faster(contender, other)
    if contender.kind == "op":
        limits = [other for other in contenders if other.kind == "limit" and other.threads == contender.threads]
        fastest = min(limits, key=lambda other: other.spread().median)
        limit = fastest.name
        ratios["limit"] = times_faster(contender, fastest)
        for other in contenders:
            another = other.kind == "peer" or (other.kind == "op" and other.name != contender.name)
            if another and other.threads == contender.threads:
                ratios[other.name] = times_faster(contender, other)
    return Result(
        op=case.op,
        dtype=case.dtype,
        zeros=case.zeros,
        rows=case.rows,
        megabytes=case.megabytes,
        coordinates=case.numel,
        kind=contender.kind,
        name=contender.name,
        threads=contender.threads,
        bytes=size,
        seconds=seconds,
        samples=len(contender.samples),
        calls=contender.calls,
        gigabytes_per_second=size / seconds.median * 1e-9,
        nanoseconds_per_coordinate=seconds.median / case.numel * 1e9,
        limit=limit,
        ratios=ratios,
    )


def write(path: Path, facts: dict[str, Any], results: Iterable[Result], bars: Iterable[Any]) -> None:
    document = {
        "format": FORMAT,
        **facts,
        "results": [asdict(result) for result in results],
        "bars": [asdict(bar) for bar in bars],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """The facts and the results of a file that :func:`write` wrote; a ValueError says what is wrong with another."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document.pop("format")
        if found != FORMAT:
            raise ValueError(f"{path} has format {found}, expected {FORMAT}")
        document.pop("bars")
        return document, [_from_json(fields) for fields in document.pop("results")]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a file of signvote bench: {type(error).__name__}: {error}") from None


def _from_json(fields: dict[str, Any]) -> Result:
    fields["seconds"] = Spread(**fields["seconds"])
    fields["ratios"] = {name: Spread(**spread) for name, spread in fields["ratios"].items()}
    return Result(**fields)
