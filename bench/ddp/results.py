"""What is measured, as it goes from the ranks to the report and to the JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from signvote.cli.bench.measure import Spread

FORMAT = 2


@dataclass(frozen=True)
class Work:
    """A workload and the methods that take turns on it.

    Attributes:
        kind: ``exchange``, ``sleep``, ``cpu`` or ``demo``, see workloads.py.
        coordinates: Of the exchange; the others have their own.
        seconds: About how long they take turns.
        longest: Seconds that one run of a method may take, by its payload and the links' rate; others are skipped.
        rounds: The fewest in which the fastest of them take part.
    """

    kind: str
    coordinates: int
    methods: list[str]
    seconds: float
    longest: float
    rounds: int


@dataclass(frozen=True)
class Job:
    """What the ranks of one launch do.

    Attributes:
        rate: Of each link in each direction, as netlab takes it.
        bits_per_second: The same; None: not limited.
    """

    works: list[Work]
    rate: str
    bits_per_second: float | None

    @classmethod
    def read(cls, path: Path) -> Job:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "works": [Work(**work) for work in fields["works"]]})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


@dataclass(frozen=True)
class Measurement:
    """One method on one workload among ``workers`` on links of ``rate``.

    Attributes:
        buckets: Coordinates of each, in the order in which the backward pass fills them.
        payload_sent, payload_received: Bytes of one run, of the rank that sends, or receives, most: of a vote as its
            state has counted, of others by formula.
        link_sent, link_received: The same, counted by the kernel on the links.
        floor: Seconds that the payload needs at the links' rate; None where that is not limited.
        seconds: Of the slowest rank in each run; None if the method was skipped.
        times_noop: How many times as long as without any exchange.
        times_faster: How many times faster than another method.
        phases: Mean seconds of a run in each phase of a vote, on the slowest rank.
        skipped: Why it was not measured.
        predicted: Seconds by the model of `signvote plan`; None: it has no such method.
    """

    workload: str
    coordinates: int
    buckets: list[int]
    workers: int
    rate: str
    method: str
    payload_sent: float
    payload_received: float
    floor: float | None
    link_sent: int = 0
    link_received: int = 0
    seconds: Spread | None = None
    samples: int = 0
    times_noop: Spread | None = None
    times_faster: dict[str, Spread] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None
    predicted: float | None = None


def write(path: Path, measurements: Sequence[Measurement], **more: Any) -> None:
    head = json.dumps({"format": FORMAT, **more})
    lines = ",\n".join(json.dumps(asdict(one)) for one in measurements)  # a line for each, so that a change shows
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(f'{head[:-1]}, "measurements": [\n{lines}\n]}}\n', encoding="utf-8")
    beside.replace(path)  # all of it or nothing, also where the writer is ended


def read(path: Path) -> list[Measurement]:
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("format") != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {document.get('format')}")
    return [_measurement(fields) for fields in document["measurements"]]


def _measurement(fields: dict[str, Any]) -> Measurement:
    for name in ("seconds", "times_noop"):
        fields[name] = fields[name] and Spread(**fields[name])
    fields["times_faster"] = {name: Spread(**spread) for name, spread in fields["times_faster"].items()}
    return Measurement(**fields)
