"""One worker's part: train a model, measure it, and compare the replicas."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm  # type: ignore[import-untyped]

from signvote.cli.demo import data, model
from signvote.cli.demo.settings import CONTEXT, SEQUENCES, Settings
from signvote.ddp import attach
from signvote.optim import SignSGD

HELD_OUT_PIECES = 2048


@dataclass(frozen=True)
class Result:
    """What training by one method gave. Bytes are one worker's: the one that sends most."""

    method: str
    optimizer: dict[str, Any]
    held_out_loss: float
    coordinates: int
    bytes_sent_per_step: float
    fp32_bytes_per_step: float
    seconds: float
    replicas_identical: bool
    train_losses: list[float]
    stats: dict[str, Any] | None


@record
def work(settings: Settings) -> list[Result]:
    """The whole life of one worker process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once, also while it waits for another
    torch.set_num_threads(1)  # the model is too small for more
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    try:
        corpus = data.load_corpus()
        return [train(method, settings, corpus) for method in settings.methods]
    finally:
        dist.destroy_process_group()


def train(method: str, settings: Settings, corpus: data.Corpus) -> Result:
    rank = dist.get_rank()
    torch.manual_seed(settings.seed)
    ddp = DistributedDataParallel(model.Transformer(context=CONTEXT))
    state = None
    # The settings below and the vote's defaults are the best of 27 tried for the vote, 11 for AdamW and 4 for SGD.
    optimizer: torch.optim.Optimizer
    if method == "vote":
        state = attach(ddp, momentum=settings.momentum, topology=settings.topology, seed=settings.seed)
        optimizer = SignSGD(ddp.parameters(), lr=settings.lr, weight_decay=0.5)
    elif method == "adamw":
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=4e-3, betas=(0.8, 0.95), weight_decay=0.1)
    else:
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.15, momentum=0.9, nesterov=True)
    scheduler = LambdaLR(optimizer, settings.schedule)
    batches = torch.Generator().manual_seed(settings.seed * settings.workers + rank)

    tqdm.set_lock(threading.RLock())  # its default is shared between processes, and leaks when one is ended
    losses = torch.zeros(settings.steps)
    start = time.perf_counter()
    with tqdm(total=settings.steps, desc=method, disable=rank != 0, unit="step") as bar:
        for step in range(settings.steps):
            optimizer.zero_grad()
            loss = model.loss(ddp, data.sample(corpus.train, SEQUENCES, CONTEXT, batches))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            losses[step] = loss.item()
            bar.set_postfix_str(f"loss {losses[step]:.3f}", refresh=False)
            bar.update()
    seconds = time.perf_counter() - start

    held_out = data.every(corpus.held_out, HELD_OUT_PIECES, CONTEXT)[rank :: settings.workers]
    dist.all_reduce(losses)
    coordinates = sum(parameter.numel() for parameter in ddp.parameters())
    fp32_bytes = 2 * (settings.workers - 1) / settings.workers * 4 * coordinates
    stats = state.stats() if state else None
    return Result(
        method=method,
        optimizer={"name": type(optimizer).__name__, **optimizer.defaults},
        held_out_loss=measure(ddp.module, held_out),
        coordinates=coordinates,
        bytes_sent_per_step=largest(stats.bytes_sent) / settings.steps if stats else fp32_bytes,
        fp32_bytes_per_step=fp32_bytes,
        seconds=seconds,
        replicas_identical=replicas_identical(ddp.module),
        train_losses=(losses / settings.workers).tolist(),
        stats=stats.as_dict() if stats else None,
    )


@torch.no_grad()
def measure(module: torch.nn.Module, pieces: Tensor) -> float:
    """Mean nats per held-out byte; each worker measures its own `pieces`."""
    total = torch.tensor([0.0, 0.0], dtype=torch.float64)
    for part in torch.split(pieces, SEQUENCES):
        total += torch.tensor([model.loss(module, part).item() * len(part), len(part)], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total[0] / total[1])


def largest(number: int) -> int:
    """The largest of the workers' numbers."""
    tensor = torch.tensor([number])
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def replicas_identical(module: torch.nn.Module) -> bool:
    """Whether every worker's parameters have the same bits."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    return all(torch.equal(own, other) for other in everyone)
