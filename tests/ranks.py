"""Real gloo ranks for tests: processes that stay up between tests, forked from one that has imported torch, since that
takes seconds.

``RankPool(4).run(function, *arguments)`` calls ``function(*arguments)`` on ranks 0 to 3 of a fresh process group and
returns their results. Functions live at the top level of a test module.

To leave a process group takes as long as a short job, most of it asleep. So there are two teams of processes: while one
leaves, the other runs the next function.
"""

import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=30)  # of what the ranks ask of each other
LEAVING_TOGETHER = timedelta(seconds=0.5)  # a rank waits so long for others, which may wait for it to leave


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
        self._teams: tuple[dict[int, _Rank], dict[int, _Rank]] = {}, {}
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
        run = next(self._runs)
        team = self._teams[run % len(self._teams)]
        _await_end(team)
        for rank in set(range(self.size)) - set(team):
            team[rank] = _Rank(self._context)
        for rank in range(world):
            team[rank].begin(rank, world, f"{self._folder.name}/store-{run}", function, arguments)
        deadline = time.monotonic() + timeout
        outcomes: list[Any] = []
        try:
            for rank in range(world):
                outcomes.append(_outcome(team, rank, deadline))
        except BaseException:  # of pytest-timeout: an answer that nobody read would be taken for that to the next test
            for rank in set(range(len(outcomes), world)) & set(team):
                team.pop(rank).kill()
            raise
        return outcomes

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            for team in self._teams:
                _await_end(team)
        finally:
            for team in self._teams:
                for rank in team.values():
                    rank.kill()
            self._folder.cleanup()


class _Rank:
    """A process that is one rank after the other."""

    def __init__(self, context: ForkServerContext) -> None:
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        there.close()
        self.is_leaving = False

    def begin(self, *job: object) -> None:
        self._connection.send(job)
        self.is_leaving = True

    def answer(self, deadline: float) -> tuple[bool, Any]:
        """Whether the rank raised, and what."""
        answer: tuple[bool, Any] = pickle.loads(self._receive(deadline))
        return answer

    def await_end(self, deadline: float) -> None:
        self._receive(deadline)
        self.is_leaving = False

    def _receive(self, deadline: float) -> bytes:
        try:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError("no answer in time")
            return self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            self.kill()
            raise RankDied(f"the rank's process ended ({error})") from error

    def kill(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()


def _outcome(team: dict[int, _Rank], rank: int, deadline: float) -> Any:
    try:
        failed, value = team[rank].answer(deadline)
    except RankDied as death:
        del team[rank]
        return death
    return RankError(value) if failed else value


def _await_end(team: dict[int, _Rank]) -> None:
    """Until all ranks have left the process group of their last job."""
    deadline = time.monotonic() + 2 * TIMEOUT.total_seconds()
    for rank in [rank for rank, of_team in team.items() if of_team.is_leaving]:
        try:
            team[rank].await_end(deadline)
        except RankDied as death:
            del team[rank]
            raise RankDied(f"rank {rank} of an earlier job, leaving its process group: {death}") from death


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported: it would take longest to look through
    if sys.platform == "linux":
        for name in ("init_process_group", "new_group"):
            setattr(dist, name, _with_patient_threads(getattr(dist, name)))
    while True:
        try:
            rank, world, store, function, arguments = connection.recv()
        except EOFError:
            return
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
        counts = dist.distributed_c10d._get_default_store()
        counts.add("connected", 1)
        for seed in (torch.manual_seed, random.seed, np.random.seed):  # forked, they would draw the same
            seed(rank)
        try:
            answer = False, function(*arguments)
        except Exception:
            answer = True, traceback.format_exc()
        # Not connection.send, which would share each tensor's memory, and that takes longer.
        connection.send_bytes(pickle.dumps(answer))
        del answer
        with contextlib.suppress(Exception):
            # What this rank closes must not look to others, who are still connecting, like the end of a peer.
            counts.add("answered", 1)
            _await_count(counts, "connected", world, TIMEOUT)
            _await_count(counts, "answered", world, LEAVING_TOGETHER)
        del counts
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        gc.collect()  # what is left of this job is not for the next one to free
        connection.send_bytes(b"")


def _await_count(counts: Any, key: str, count: int, timeout: timedelta) -> None:
    """Return when ``count`` is reached, or when the time is over."""
    deadline = time.monotonic() + timeout.total_seconds()
    while counts.add(key, 0) < count and time.monotonic() < deadline:
        time.sleep(0.002)


def _with_patient_threads(make: Callable[..., Any]) -> Callable[..., Any]:
    """``make``, whose threads wait for a free CPU. gloo's otherwise interrupts the one that sends, and then spins for
    the lock that this one holds, until the end of its time slice."""

    @functools.wraps(make)
    def making(*arguments: Any, **options: Any) -> Any:
        with contextlib.suppress(OSError):  # where a sandbox refuses it, tests only take longer
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        try:
            return make(*arguments, **options)
        finally:
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

    return making
