"""Start a module of this package as the ranks of a lab."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import netlab

BENCH = Path(__file__).parent.parent
LAUNCH_SECONDS = 900.0  # for the ranks of one launch


class RankError(Exception):
    """A rank failed; it has said why."""


def run_ranks(lab: netlab.Lab, module: str, *arguments: Path) -> None:
    """Return when all ranks have ended well.

    Raises:
        RankError: One has failed, and the others were ended.
        TimeoutError: They took longer than LAUNCH_SECONDS.
    """
    command = [sys.executable, "-m", f"ddp.{module}", *map(str, arguments)]
    path = os.pathsep.join([str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Without names of hosts c10d warns that it cannot look them up.
    environment = {"PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    status = lab.run(command, timeout=LAUNCH_SECONDS, environment=environment)
    if status != 0:
        raise RankError(f"a rank of M={lab.workers} ended with status {status}")
