"""Real gloo ranks for tests: processes that stay up between tests, forked from one that has imported torch, since that
takes seconds.

``RankPool(4).run(function, *arguments)`` calls ``function(*arguments)`` on ranks 0 to 3 of a fresh process group and
returns their results. Functions live at the top level of a test module.
"""

import contextlib
import itertools
import multiprocessing
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


class RankDied(AssertionError):
    """A rank's process ended, or did not answer in time."""


class RankPool:
    def __init__(self, size: int) -> None:
        self.size = size
        self._context = multiprocessing.get_context("forkserver")
        # What test modules import, and what an optimizer does in its first step.
        self._context.set_forkserver_preload(["signvote.ddp", "hypothesis", "pytest", "torch._dynamo"])
        self._ranks: dict[int, tuple[ForkServerProcess, Connection]] = {}
        self._runs = itertools.count()
        self._folder = tempfile.TemporaryDirectory()

    def run(
        self, function: Callable[..., Any], *arguments: Any, world: int | None = None, timeout: float = 60.0
    ) -> list[Any]:
        """Results of all ranks; raises :class:`RankError` if any raised."""
        outcomes = self.outcomes(function, *arguments, world=world, timeout=timeout)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                raise RankError(f"rank {rank}: {outcome}") from outcome
        return outcomes

    def outcomes(
        self, function: Callable[..., Any], *arguments: Any, world: int | None = None, timeout: float = 60.0
    ) -> list[Any]:
        """Results of all ranks, in place of each that raised or died its :class:`RankError` or :class:`RankDied`."""
        world = self.size if world is None else world
        store = os.path.join(self._folder.name, f"store-{next(self._runs)}")
        for rank in set(range(self.size)) - set(self._ranks):
            self._start(rank)
        for rank in range(world):
            self._ranks[rank][1].send((rank, world, store, function, arguments))
        deadline = time.monotonic() + timeout
        outcomes: list[Any] = []
        try:
            for rank in range(world):
                outcomes.append(self._outcome(rank, deadline))
        except BaseException:  # of pytest-timeout: an answer that nobody read would be taken for that to the next test
            for rank in set(range(len(outcomes), world)) & set(self._ranks):
                self._kill(rank)
            raise
        return outcomes

    def _start(self, rank: int) -> None:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        there.close()
        self._ranks[rank] = process, here

    def _outcome(self, rank: int, deadline: float) -> Any:
        connection = self._ranks[rank][1]
        try:
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError("no answer in time")
            failed, value = connection.recv()
        except (EOFError, OSError) as error:
            self._kill(rank)
            return RankDied(f"the rank's process ended ({error})")
        return RankError(value) if failed else value

    def _kill(self, rank: int) -> None:
        process, connection = self._ranks.pop(rank)
        connection.close()
        process.kill()
        process.join()

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exception: object) -> None:
        for rank in list(self._ranks):
            self._kill(rank)
        self._folder.cleanup()


def _serve(connection: Connection) -> None:
    import numpy
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            rank, world, store, function, arguments = connection.recv()
        except EOFError:
            return
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=30),
        )
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):  # forked, they would draw the same
            seed(rank)
        try:
            answer = False, function(*arguments)
        except Exception:
            answer = True, traceback.format_exc()
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        connection.send(answer)
