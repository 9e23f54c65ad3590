"""Start the workers with torchrun's own machinery and wait for them."""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
import uuid

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from signvote.cli.demo import train
from signvote.cli.demo.settings import Settings


class WorkerError(Exception):
    """A worker failed; the message says which and why."""


def launch(settings: Settings) -> list[train.Result]:
    """Train on `settings.workers` processes of this machine; the results as rank 0 saw them."""
    # What they would log about a worker that failed is raised below, in one line.
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    start_method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():  # not on Windows
        start_method = "forkserver"
        multiprocessing.set_forkserver_preload([train.__name__])  # torch is imported once and not by every worker
    with tempfile.TemporaryDirectory(prefix="signvote-demo-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=settings.workers,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            start_method=start_method,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            results: dict[int, list[train.Result]] = elastic_launch(config, train.work)(settings)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise WorkerError(f"worker {rank} failed: {describe(failure)}") from error
        except SignalException as error:
            raise KeyboardInterrupt from error
    return results[0]


def describe(failure: ProcessFailure) -> str:
    """The worker's exception, or the signal that ended it."""
    message = failure.error_file_data["message"]
    return str(message["message"]) if isinstance(message, dict) else failure.message
