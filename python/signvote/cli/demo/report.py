"""What the demo shows and leaves: a table, a plot and a JSON file."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import signvote
from signvote.cli.demo.settings import CONTEXT, SEQUENCES, WARMUP, Settings
from signvote.cli.demo.train import Result
from signvote.cli.json_values import finite
from signvote.implementation import default_implementation

LABELS = {"vote": "majority vote", "adamw": "AdamW, fp32", "sgd": "SGD, fp32"}

HEADER = (
    ("", "held-out", "loss in", "", "one worker sends", "fp32 all-reduce", "", "replicas"),
    ("", "nats", "bits/byte", "coordinates", "bytes/step", "bytes/step", "seconds", "identical"),
)


def table(results: Sequence[Result]) -> str:
    """One line for each method."""
    rows = [*HEADER, *map(row, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in rows]
    lines.insert(len(HEADER), "-" * len(lines[0]))
    return "\n".join(lines)


def row(result: Result) -> tuple[str, ...]:
    return (
        LABELS[result.method],
        f"{result.held_out_loss:.3f}",
        f"{result.held_out_loss / math.log(2):.3f}",
        f"{result.coordinates:,}",
        f"{result.bytes_sent_per_step:,.0f}",
        f"{result.fp32_bytes_per_step:,.0f}",
        f"{result.seconds:.1f}",
        "yes" if result.replicas_identical else "NO",
    )


def savings(vote: Result) -> str:
    """The sentence under the table."""
    if vote.bytes_sent_per_step == 0:
        return "One worker alone sends nothing."
    times = vote.fp32_bytes_per_step / vote.bytes_sent_per_step
    return f"The vote sends {times:.1f} times fewer bytes than a ring all-reduce of fp32 gradients."


def write_json(path: Path, settings: Settings, results: Sequence[Result]) -> None:
    versions = {
        "signvote": signvote.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    report = {
        "options": asdict(settings),
        "recipe": {"sequences": SEQUENCES, "context": CONTEXT, "warmup": WARMUP},
        "versions": versions,
        "implementation": default_implementation(),
        "results": [
            asdict(result) | {"held_out_bits_per_byte": result.held_out_loss / math.log(2)} for result in results
        ],
    }
    path.write_text(json.dumps(finite(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_plot(path: Path, results: Sequence[Result]) -> None:
    """Training loss over steps, and over the bytes that one worker has sent; held-out loss at the end."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    over_steps, over_bytes = figure.subplots(1, 2, sharey=True)
    for result in results:
        curve = smooth(result.train_losses)
        steps = range(1, len(curve) + 1)
        for axes, scale in ((over_steps, 1.0), (over_bytes, result.bytes_sent_per_step)):
            places = [scale * step for step in steps]
            (line,) = axes.plot(places, curve, label=LABELS[result.method], linewidth=1)
            axes.plot(places[-1], result.held_out_loss, "o", color=line.get_color())
    over_steps.set(xlabel="step", ylabel="loss, nats per byte")
    over_bytes.set(xlabel="bytes sent by one worker", xscale="log" if results[0].bytes_sent_per_step else "linear")
    over_steps.legend(title="line: training, dot: held out")
    for axes in (over_steps, over_bytes):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of the last few losses at each step, so that the line can be read."""
    recent = [losses[max(0, step - 9) : step + 1] for step in range(len(losses))]
    return [sum(some) / len(some) for some in recent]
