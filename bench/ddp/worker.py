"""One rank's part, started by bench_ddp.py on each host of the lab: ``python -m ddp.worker JOB.json RESULTS.json``.

The methods of a workload take turns, A B C A B C ... Before any is timed, its result is checked.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import netlab
from ddp import results
from ddp.methods import METHODS, NOOP, Method, coordinates
from ddp.results import Job, Measurement, Work
from ddp.workloads import Workload, new_workload
from signvote.cli.bench.measure import (
    MAX_ROUNDS,
    MIN_SAMPLES,
    SLOW,
    Contender,
    no_garbage_collection,
    times_faster,
)
from signvote.ddp import VoteStats

TIMEOUT = timedelta(seconds=60)  # of a collective
LONG_SECONDS = 1.5  # a run that takes longer is not repeated more than it must be
WINDOW = 64  # coordinates of each gradient that are compared with a reference
WINDOWS = 33  # more than twice as many as the most workers
ALTERNATIVES = ("fp32", "fp16", "powersgd-1", "powersgd-4")
PHASES = ("pack", "exchange", "vote", "unpack")


class WrongResultError(Exception):
    """A method's result is not what it has to be."""


def main(job_path: str, results_path: str) -> None:
    job = Job.read(Path(job_path))
    dist.init_process_group("gloo", timeout=TIMEOUT)
    measurements: list[Measurement] = []
    try:
        with no_garbage_collection():
            for work in job.works:
                measurements += measure(work, job)
                if int(os.environ["RANK"]) == 0:  # now, so that it is there if a later one fails
                    results.write(Path(results_path), measurements)
    finally:
        dist.destroy_process_group()


def measure(work: Work, job: Job) -> list[Measurement]:
    workload = new_workload(work.kind, work.coordinates)
    workload.prepare(NOOP)
    workload.run(NOOP)
    own = window(workload.gradients(NOOP))
    runners, skipped = [], []
    for method in (METHODS[name] for name in work.methods):
        begun = begin(work, job, workload, method)
        if begun.skipped is None:
            runners.append(Runner(method, workload, own, begun))
        else:
            skipped.append(begun)
    take_turns(runners, work)
    contenders = {runner.method.name: runner.contender for runner in runners}
    return [*(runner.measurement(contenders) for runner in runners), *skipped]


def begin(work: Work, job: Job, workload: Workload, method: Method) -> Measurement:
    """What is known before anything runs."""
    workers = dist.get_world_size()
    payload = method.payload(workload.shapes, workers)
    floor = floor_seconds(payload, job.bits_per_second)
    return Measurement(
        workload=work.kind,
        coordinates=coordinates(workload.shapes),
        buckets=workload.buckets(method),
        workers=workers,
        rate=job.rate,
        method=method.name,
        payload_sent=payload,
        payload_received=payload,
        floor=floor,
        skipped=None if floor is None or floor <= work.longest else f"takes more than {floor:.2g} s",
    )


def floor_seconds(payload: float, bits_per_second: float | None) -> float | None:
    return None if bits_per_second is None else 8 * payload / bits_per_second


class Runner:
    """A method on a workload: checked, and timed in turns with others."""

    def __init__(self, method: Method, workload: Workload, own: Tensor, begun: Measurement) -> None:
        self.method = method
        self.workload = workload
        self.begun = begun
        self.contender = Contender("method", method.name, torch.get_num_threads(), lambda: workload.run(method))
        workload.prepare(method)
        self._count()
        check(method, own, workload.gradients(method))
        self._count()  # anew: the first run allocates, and takes up to three times as long
        if self.estimate > LONG_SECONDS:
            self.contender.samples[-1] = self.estimate
        self._stats = self._vote_stats()

    def _count(self) -> None:
        """Run once, with the bytes on the link and an estimate of the time that is the same on all ranks."""
        before = traffic()
        dist.barrier()
        silent = traffic()  # what the barriers alone send
        voted = self._vote_stats()
        seconds = self.sample()
        stats = self._vote_stats()
        after = traffic()
        (self.estimate,) = largest(seconds)
        sent, received = largest(
            after.sent - 2 * silent.sent + before.sent, after.received - 2 * silent.received + before.received
        )
        self.begun = replace(self.begun, link_sent=max(0, int(sent)), link_received=max(0, int(received)))
        if stats is not None and voted is not None:
            sent, received = largest(stats.bytes_sent - voted.bytes_sent, stats.bytes_received - voted.bytes_received)
            self.begun = replace(self.begun, payload_sent=sent, payload_received=received)

    def _vote_stats(self) -> VoteStats | None:
        return self.workload.state(self.method).stats() if self.method.result == "vote" else None

    def sample(self) -> float:
        """Seconds of a run on this rank, which begins when all ranks do."""
        self.workload.prepare(self.method)
        dist.barrier()
        begin = time.perf_counter()
        self.contender.call()
        return time.perf_counter() - begin

    def measurement(self, contenders: dict[str, Contender]) -> Measurement:
        ratios = {
            name: times_faster(self.contender, other)
            for name, other in contenders.items()
            if name in ALTERNATIVES and name != self.method.name
        }
        noop = contenders.get(NOOP.name)
        return replace(
            self.begun,
            seconds=self.contender.spread(),
            samples=len(self.contender.samples),
            times_noop=None if noop is None else times_faster(noop, self.contender),
            times_faster=ratios,
            phases=self._phases(),
        )

    def _phases(self) -> dict[str, float]:
        stats = self._vote_stats()
        if stats is None or self._stats is None:
            return {}
        runs = max(1, stats.steps - self._stats.steps)
        names = [f"{phase}_seconds" for phase in PHASES]
        seconds = [(getattr(stats, name) - getattr(self._stats, name)) / runs for name in names]
        return dict(zip(PHASES, largest(*seconds), strict=True))


def schedule(estimates: Sequence[float], seconds: float, fewest: int) -> tuple[int, list[int]]:
    """How many rounds, and in how many of them each takes part, whose runs take about ``estimates``."""
    if not estimates:
        return 0, []
    slow = SLOW * min(estimates)
    rounds = int(seconds / sum(min(estimate, slow) for estimate in estimates))
    rounds = min(max(rounds, fewest), MAX_ROUNDS)
    return rounds, [
        1 if estimate > LONG_SECONDS else min(rounds, max(MIN_SAMPLES, int(rounds * slow / estimate)))
        for estimate in estimates
    ]


def take_turns(runners: Sequence[Runner], work: Work) -> None:
    """Fill the samples of all, in about ``work.seconds`` or the fewest rounds: see measure.py for the constants."""
    rounds, turns = schedule([runner.estimate for runner in runners], work.seconds, work.rounds)
    for turn in range(rounds):
        for k in range(len(runners)):
            i = (k + turn) % len(runners)
            if (turn + 1) * turns[i] // rounds > turn * turns[i] // rounds:
                runners[i].contender.samples[turn] = runners[i].sample()
    for runner in runners:
        samples = runner.contender.samples
        runner.contender.samples = dict(zip(samples, largest(*samples.values()), strict=True))


def largest(*numbers: float) -> list[float]:
    """Each the largest of all ranks'."""
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    found: list[float] = tensor.tolist()
    return found


def traffic() -> netlab.Traffic:
    """What has gone over this rank's link, at a moment when all ranks are silent."""
    dist.barrier()
    counted = netlab.traffic_of(os.environ["NETLAB"], dist.get_rank())
    dist.barrier()
    return counted


def window(gradients: Sequence[Tensor]) -> Tensor:
    """A few coordinates from WINDOWS places of each, the first and the last among them: every shard has some."""
    pieces = []
    for gradient in gradients:
        flat = gradient.flatten()
        if flat.numel() <= WINDOW * WINDOWS:
            pieces.append(flat)
        else:
            begins = ((flat.numel() - WINDOW) * i // (WINDOWS - 1) for i in range(WINDOWS))
            pieces += [flat[begin : begin + WINDOW] for begin in begins]
    return torch.cat(pieces)


def check(method: Method, own: Tensor, gradients: Sequence[Tensor]) -> None:
    """Compare a few coordinates with what they have to be, given each rank's ``own``, and all with the other ranks'."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    found = window(gradients)
    everyone = [torch.empty_like(own) for _ in range(workers)]
    dist.all_gather(everyone, own)
    stack = torch.stack(everyone)
    if method.result == "own":
        require(torch.equal(found, own), method, "the gradients have changed")
        return
    sums = torch.stack([gradient.view(torch.int32).sum() for gradient in gradients])
    others = [torch.empty_like(sums) for _ in range(workers)]
    dist.all_gather(others, sums)
    require(all(torch.equal(sums, other) for other in others), method, f"rank {rank} has another result than others")
    if method.result == "mean":
        mean = stack.mean(0)
        error = float((found - mean).abs().max() / mean.abs().max())
        require(error < 1e-3, method, f"off the mean by {error:.1e} of its largest coordinate")
    elif method.result == "vote":
        votes = stack.sign().sum(0)
        decided = (votes != 0) & (stack != 0).all(0)
        wrong = int((found != votes.sign())[decided].sum())
        require(wrong == 0, method, f"{wrong} of {int(decided.sum())} coordinates follow the minority")
        require(bool((found.abs() == 1).all()), method, "there are votes other than +1 and -1")
    else:
        require(bool(found.isfinite().all() and found.any()), method, "nothing but zeros, or no numbers")


def require(condition: bool, method: Method, problem: str) -> None:
    if not condition:
        raise WrongResultError(f"{method.name}: {problem}")


if __name__ == "__main__":
    main(*sys.argv[1:])
