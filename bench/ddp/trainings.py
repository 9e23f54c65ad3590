"""What time_to_loss.py is to measure, and what it has measured, kept in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddp.training import RANKS, Curve, Run, Timing, Turns
from signvote.cli.bench.machine import machine, versions

FORMAT = 1
POWERSGD = {method: f"AdamW, PowerSGD {rank}" for method, rank in RANKS.items()}
LABELS = {
    "noop": "no exchange",
    "vote": "majority vote",
    "fp32": "AdamW, fp32",
    "fp16": "AdamW, fp16 hook",
    **POWERSGD,
}
METHODS = [name for name in LABELS if name != "noop"]
COMPARED = ("vote", "fp32")  # what the bar speaks of; trained on the links in full
# The same grid for all, around what `signvote demo` has; where the best is at its end, it grows.
FACTORS = (0.25, 0.5, 1.0, 2.0)
DEMO_LR = {**dict.fromkeys(METHODS, 4e-3), "vote": 2e-3}
MOST_SETTINGS = 7
TUNING_SEED = 1000


@dataclass
class Store:
    """What has been measured so far, and on which machine with which versions."""

    machine: dict[str, object] = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=versions)
    curves: list[Curve] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    pieces: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Store:
        """What is in the file.

        Raises:
            ValueError: It has another format, or was written on another machine or with other versions: seconds of
                one say nothing of those of another.
        """
        if not path.exists():
            return cls()
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("format") != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT}, got {document.get('format')}")
        store = cls(pieces=document["pieces"])
        for kind in ("machine", "versions"):
            there, here = document.get(kind, {}), json.loads(json.dumps(getattr(store, kind)))
            for name in sorted({*there, *here}):
                if there.get(name) != here.get(name):
                    raise ValueError(
                        f"{path}: {kind}: {name}: expected {here.get(name)!r}, as it is now, to go on from it, got "
                        f"{there.get(name)!r}: choose another --out"
                    )
        for kind in ("curves", "timings"):
            for fields in document[kind]:
                store.add(fields)
        return store

    def add(self, fields: dict[str, Any]) -> None:
        if "run" in fields:
            self.curves.append(Curve(**{**fields, "run": Run(**fields["run"])}))
        else:
            self.timings.append(Timing(**{**fields, "turns": Turns(**fields["turns"])}))

    def write(self, path: Path, **more: Any) -> None:
        kinds = {kind: [asdict(one) for one in getattr(self, kind)] for kind in ("curves", "timings")}
        where = {"machine": self.machine, "versions": self.versions}
        document = {"format": FORMAT, **where, **more, "pieces": self.pieces, **kinds}
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(path)

    def curve(self, run: Run) -> Curve | None:
        return next((curve for curve in self.curves if curve.run == run), None)

    def timing(self, turns: Turns) -> Timing | None:
        return next((timing for timing in self.timings if timing.turns == turns), None)


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    workers: int
    steps: int
    every: int
    seeds: tuple[int, ...]
    rates: tuple[str, ...]
    sleep: float
    rounds: int
    tuned: bool

    def turns(self, rate: str, sleep: float) -> Turns:
        return Turns(list(LABELS), self.workers, sleep, self.rounds, rate)

    def tuning(self, method: str, lr: float) -> Run:
        steps = max(1, self.steps // 2)
        return Run(method, lr, TUNING_SEED, self.workers, steps, steps, "tuning", "none")

    def training(self, method: str, lr: float, seed: int, rate: str = "none") -> Run:
        return Run(method, lr, seed, self.workers, self.steps, self.every, "held-out", rate)

    def batches(self, store: Store) -> Iterator[tuple[str, list[Run], list[Turns]]]:
        """Rates, and what is missing on links of it; each from what the batches before have given."""
        for rate in self.rates:
            yield rate, [], [self.turns(rate, sleep) for sleep in (0.0, self.sleep)]
        while True:
            runs = [self.tuning(method, lr) for method in METHODS for lr in self.learning_rates(method, store)]
            if all(store.curve(run) for run in runs):
                break
            yield "none", runs, []
        best = {method: self.best(method, store) for method in METHODS}
        yield "none", [self.training(method, best[method], seed) for seed in self.seeds for method in METHODS], []
        for rate in self.rates:
            yield rate, [self.training(method, best[method], self.seeds[0], rate) for method in COMPARED], []

    def tried(self, method: str, store: Store) -> dict[float, float]:
        """The loss with each learning rate."""
        found = [curve for curve in store.curves if curve.run == self.tuning(method, curve.run.lr)]
        return {curve.run.lr: math.inf if curve.losses[-1] is None else curve.losses[-1] for curve in found}

    def learning_rates(self, method: str, store: Store) -> list[float]:
        """The grid, and beyond its end while the best is there."""
        if not self.tuned:
            return []
        grid = [factor * DEMO_LR[method] for factor in FACTORS]
        tried = self.tried(method, store)
        grid += sorted(set(tried) - set(grid))
        if set(grid) <= set(tried) and len(grid) < MOST_SETTINGS:
            best = min(grid, key=lambda lr: tried[lr])
            if best == max(grid):
                grid.append(2 * best)
            elif best == min(grid):
                grid.append(best / 2)
        return grid

    def best(self, method: str, store: Store) -> float:
        if not self.tuned:
            return DEMO_LR[method]
        tried = self.tried(method, store)
        return min(tried, key=lambda lr: tried[lr])
