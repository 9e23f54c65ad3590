"""One rank's part of time_to_loss.py, started on each host: ``python -m ddp.training JOB.json RESULTS.jsonl``.

It trains the model of `signvote demo`, and times steps of the methods in turns, A B C A B C ...
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from ddp.methods import METHODS
from ddp.worker import largest, traffic
from ddp.workloads import ONE_BUCKET_MB, SleepingLayer
from signvote.cli.bench.measure import no_garbage_collection
from signvote.cli.demo import data, model
from signvote.cli.demo.settings import CONTEXT, SEQUENCES, Settings
from signvote.cli.demo.train import measure, replicas_identical
from signvote.ddp import attach
from signvote.optim import SignSGD

TIMEOUT = timedelta(seconds=60)  # of a collective
PIECES = 512  # of the held-out text on which a loss is measured
BLOCK = 5  # steps of a sample: one after the other without a barrier, as in training
RANKS = {"powersgd-1": 1, "powersgd-4": 4}  # of PowerSGD
# Layers that begin as zeros give others a gradient of zeros in the first step, of which PowerSGD makes NaN.
PLAIN_STEPS = 10  # of PowerSGD: all-reduces of fp32, before it begins to compress
MOMENTUM, TOPOLOGY = 0.7, "sharded"  # of the vote, as in the demo


@dataclass(frozen=True)
class Run:
    """A training, and where its loss is measured: on the ``held-out`` pieces or on others of that text (``tuning``)."""

    method: str
    lr: float
    seed: int
    workers: int
    steps: int
    every: int
    pieces: str
    rate: str


@dataclass(frozen=True)
class Curve:
    """What a run gave.

    Attributes:
        at: After which steps the loss was measured.
        losses: Mean nats per byte; None: not a finite number.
        seconds: Of training until then, without the measurements of the loss: of the slowest rank.
        identical: Whether the parameters had the same bits on all ranks at the end.
    """

    run: Run
    at: list[int]
    losses: list[float | None]
    seconds: list[float]
    identical: bool


@dataclass(frozen=True)
class Turns:
    """Steps to be timed, ``rounds`` samples of each method; learning rates do not matter for it.

    Attributes:
        sleep: Seconds a step sleeps instead of computing; 0: it computes.
    """

    methods: list[str]
    workers: int
    sleep: float
    rounds: int
    rate: str


@dataclass(frozen=True)
class Timing:
    """Seconds of a step in each sample, and bytes that the rank that sends most has sent over its link in a step."""

    turns: Turns
    seconds: dict[str, list[float]]
    link_sent: dict[str, float]


def new_ddp(method: str, module: nn.Module, seed: int, **options: Any) -> DistributedDataParallel:
    """``module`` under DDP with the method's hook, as its users have it."""
    if method in RANKS:
        options["bucket_cap_mb"] = ONE_BUCKET_MB  # with more than one it dies over gloo
    ddp = DistributedDataParallel(module, **options)
    if method == "vote":
        attach(ddp, momentum=MOMENTUM, topology=TOPOLOGY, seed=seed)
    elif method in RANKS:
        state = powerSGD_hook.PowerSGDState(dist.group.WORLD, RANKS[method], start_powerSGD_iter=PLAIN_STEPS)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    else:
        hook, hook_state = METHODS[method].new_hook(module)
        ddp.register_comm_hook(hook_state, hook)
    return ddp


class Training:
    """The demo's training by one method."""

    def __init__(self, method: str, corpus: data.Corpus, lr: float, seed: int, steps: int) -> None:
        workers = dist.get_world_size()
        torch.manual_seed(seed)
        self.ddp = new_ddp(method, model.Transformer(context=CONTEXT), seed)
        self._corpus = corpus
        self._optimizer: torch.optim.Optimizer
        if method == "vote":
            self._optimizer = SignSGD(self.ddp.parameters(), lr=lr, weight_decay=0.5)
        else:
            self._optimizer = torch.optim.AdamW(self.ddp.parameters(), lr=lr, betas=(0.8, 0.95), weight_decay=0.1)
        self._scheduler = LambdaLR(
            self._optimizer, Settings(workers, steps, TOPOLOGY, MOMENTUM, lr, seed, compare=False).schedule
        )
        self._batches = torch.Generator().manual_seed(seed * workers + dist.get_rank())

    def step(self) -> None:
        self._optimizer.zero_grad()
        loss = model.loss(self.ddp, data.sample(self._corpus.train, SEQUENCES, CONTEXT, self._batches))
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._scheduler.step()


class Part(SleepingLayer):
    """Some of the model's parameters: sleeps instead of computing, as an accelerator would leave the CPU free."""

    def __init__(self, parameters: Sequence[nn.Parameter], seconds: float) -> None:
        nn.Module.__init__(self)
        self.parts = nn.ParameterList(parameters)
        self.seconds = seconds
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.own = [torch.randn(parameter.shape, generator=generator) for parameter in parameters]


class Sleeping:
    """Steps of a model with the same parameters, all of whose computation, the optimizer's too, is slept."""

    def __init__(self, method: str, seconds: float) -> None:
        transformer = model.Transformer(context=CONTEXT)
        groups = [transformer.embedding, *transformer.blocks, nn.ModuleList([transformer.norm, transformer.head])]
        share = seconds / sum(parameter.numel() for parameter in transformer.parameters())
        parts = [
            Part(found, share * sum(parameter.numel() for parameter in found))
            for found in (list(group.parameters()) for group in groups)
        ]
        # The gradients are written where DDP wants them, as little work for the CPU as can be.
        self._ddp = new_ddp(method, nn.Sequential(*parts), 0, gradient_as_bucket_view=True)
        self._start = torch.zeros((), requires_grad=True)

    def step(self) -> None:
        self._ddp.zero_grad()
        self._ddp(self._start).backward()


def train(run: Run, corpus: data.Corpus) -> Curve:
    training = Training(run.method, corpus, run.lr, run.seed, run.steps)
    pieces = data.every(corpus.held_out, 2 * PIECES, CONTEXT)[run.pieces == "tuning" :: 2]
    own = pieces[dist.get_rank() :: dist.get_world_size()]
    at = [0, *range(run.every, run.steps, run.every), run.steps]
    losses = [measured(training.ddp.module, own)]
    seconds = [0.0]
    for before, after in itertools.pairwise(at):
        seconds.append(seconds[-1] + steps_seconds(training.step, after - before))
        losses.append(measured(training.ddp.module, own))
    return Curve(run, at, losses, seconds, replicas_identical(training.ddp.module))


def measured(module: nn.Module, pieces: Tensor) -> float | None:
    loss = measure(module, pieces)
    return loss if math.isfinite(loss) else None


def steps_seconds(step: Callable[[], None], number: int) -> float:
    """Seconds of that many steps on the slowest rank, which begin when all ranks do."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(number):
        step()
    return largest(time.perf_counter() - begin)[0]


def take_turns(turns: Turns, corpus: data.Corpus) -> Timing:
    steps: dict[str, Callable[[], None]] = {}
    for method in turns.methods:
        if turns.sleep > 0.0:
            steps[method] = Sleeping(method, turns.sleep).step
        else:
            steps[method] = Training(method, corpus, 1e-3, 0, 1_000_000).step
    link_sent = {}
    for method, step in steps.items():
        steps_seconds(step, PLAIN_STEPS + 2 if method in RANKS else 2)  # DDP lays its buckets anew after the first
        before = traffic().sent
        steps_seconds(step, BLOCK)
        link_sent[method] = largest(traffic().sent - before)[0] / BLOCK
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    for turn in range(turns.rounds):
        for k in range(len(steps)):
            method = turns.methods[(k + turn) % len(steps)]
            seconds[method].append(steps_seconds(steps[method], BLOCK) / BLOCK)
    return Timing(turns, seconds, link_sent)


def main(job_path: str, results_path: str) -> None:
    """Do the job until ``stop_after`` seconds are over: a line of JSON for each part, as soon as it is done."""
    begin = time.perf_counter()
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    tasks: list[Run | Turns] = [
        *(Run(**fields) for fields in job["runs"]),
        *(Turns(**fields) for fields in job["turns"]),
    ]
    torch.set_num_threads(1)  # the model is too small for more
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        corpus = data.load_corpus()
        with no_garbage_collection():
            for done, task in enumerate(tasks):
                if done and largest(time.perf_counter() - begin)[0] > job["stop_after"]:
                    break
                found = train(task, corpus) if isinstance(task, Run) else take_turns(task, corpus)
                if int(os.environ["RANK"]) == 0:
                    with open(results_path, "a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(found)) + "\n")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
