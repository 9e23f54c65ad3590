"""The command line: `signvote COMMAND`, or `python -m signvote COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from signvote import __version__
from signvote.cli import bench, demo, info, plan


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="signvote", description="Train by majority vote: one bit per gradient coordinate in each direction."
    )
    parser.add_argument("--version", action="version", version=f"signvote {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, bench, plan, info):
        command.add_parser(commands)
    options = parser.parse_args(argv)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        print("signvote: interrupted", file=sys.stderr)
        return 130
    return status
