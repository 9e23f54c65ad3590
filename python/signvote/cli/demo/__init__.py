"""`signvote demo`: train a small language model by majority vote on this machine."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from signvote.cli.demo.settings import Settings
from signvote.ddp.options import TOPOLOGIES, VoteOptions

EXTRAS = ("tqdm", "matplotlib")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small language model by majority vote on this machine",
        description="Train a byte-level transformer on the Python standard library's own source files, with gloo "
        "workers on this machine that send one bit per coordinate; print a table, write demo.png and demo.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--workers", type=positive, default=4, metavar="M", help="worker processes; each reads 16 sequences a step")
    add("--steps", type=positive, default=600, metavar="N", help="training steps")
    add("--topology", choices=TOPOLOGIES, default="sharded", help="who counts the votes")
    add(
        "--momentum",
        type=float,
        nargs="+",
        default=[0.7],
        metavar="BETA",
        help="each worker's momentum: one number, or two (send, keep) as in Lion; 0 is signSGD",
    )
    add("--lr", type=float, default=2e-3, help="learning rate of the vote at the top of its schedule")
    add("--seed", type=int, default=0, help="of the model, the batches and the coins")
    add("--compare", action="store_true", help="also train AdamW and SGD with fp32 all-reduce")
    add("--out", type=Path, default=Path("signvote-demo"), metavar="FOLDER", help="where the plot and the JSON go")
    parser.set_defaults(run=run, fail=parser.error)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def run(options: argparse.Namespace) -> int:
    try:
        settings = settings_from(options)
    except ValueError as error:
        options.fail(str(error))
    missing = [name for name in EXTRAS if find_spec(name) is None]
    if missing:
        print(f"signvote demo: needs {' and '.join(missing)}: pip install 'signvote[demo]'", file=sys.stderr)
        return 1

    # Imported here because they import the extras.
    from signvote.cli.demo import report
    from signvote.cli.demo.launch import WorkerError, launch

    try:
        options.out.mkdir(parents=True, exist_ok=True)
        results = launch(settings)
        print(report.table(results))
        print(f"\n{report.savings(results[0])}")
        report.write_json(options.out / "demo.json", settings, results)
        report.write_plot(options.out / "demo.png", results)
    except (OSError, WorkerError) as error:
        print(f"signvote demo: {error}", file=sys.stderr)
        return 1
    print(f"Plot and figures: {options.out / 'demo.png'}, {options.out / 'demo.json'}")
    return 0 if all(result.replicas_identical for result in results) else 1


def settings_from(options: argparse.Namespace) -> Settings:
    """The checked choices; a ValueError names the wrong one."""
    if len(options.momentum) > 2:
        raise ValueError(f"argument --momentum: expected one or two numbers, got {len(options.momentum)}")
    momentum = options.momentum[0] if len(options.momentum) == 1 else tuple(options.momentum)
    vote = VoteOptions(momentum=momentum, topology=options.topology, seed=options.seed)
    if vote.seed >= 2**32:
        raise ValueError(f"argument --seed: expected at most {2**32 - 1}, got {vote.seed}")
    if not 0.0 < options.lr < float("inf"):
        raise ValueError(f"argument --lr: expected a number above 0, got {options.lr}")
    return Settings(
        workers=options.workers,
        steps=options.steps,
        topology=vote.topology,
        momentum=vote.momentum,
        lr=options.lr,
        seed=vote.seed,
        compare=options.compare,
    )
