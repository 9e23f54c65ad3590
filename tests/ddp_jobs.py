"""Small training jobs that tests run on real ranks, with a record of what went into each vote and what came out."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from signvote.ddp import MajorityVoteState, majority_vote_hook
from signvote.ddp.channel import Channel


class Branches(nn.Module):
    """Of two branches one is used, another on each rank and in each step; `never` is used by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.never = nn.Linear(7, 5), nn.Linear(7, 5), nn.Linear(7, 5)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (self.left if (self.calls + dist.get_rank()) % 3 else self.right)(x)


class MixedDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 33), nn.Linear(33, 5, dtype=torch.bfloat16)
        self.third = nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x).bfloat16()).double())


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(7, 9), nn.Linear(9, 5)
        self.body.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Scalar(nn.Module):
    """One parameter of one element: smaller than a word, smaller than the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


class Empty(nn.Module):
    """Parameters without elements: the first is the last to get a gradient, in a bucket of its own if that is tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.body = nn.Parameter(torch.zeros(0, 3)), nn.Linear(7, 5)
        self.after = nn.Parameter(torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x + self.before.sum()) + self.after.sum()


class Rows(nn.Module):
    """An embedding of which a step touches few rows: most coordinates are exactly zero."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.Embedding(50, 7), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rows((x.abs().sum(1) * 10).long() % 50))


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.conv.weight = nn.Parameter(self.conv.weight.contiguous(memory_format=torch.channels_last))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x[:, :3, None, None].expand(-1, 3, 4, 4).contiguous(memory_format=torch.channels_last))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 40), nn.ReLU(), nn.Linear(40, 5))


def deep() -> nn.Module:
    """40 parameters, each in a bucket of its own where the bucket's cap is tiny."""
    return nn.Sequential(*(nn.Linear(7, 7) for _ in range(20)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "deep": deep,
    "branches": Branches,
    "mixed": MixedDtypes,
    "frozen": Frozen,
    "scalar": Scalar,
    "empty": Empty,
    "rows": Rows,
    "channels_last": ChannelsLast,
}


@dataclass(frozen=True)
class Job:
    """What to train and how. ``uneven``: rank r has r fewer batches, under ``Join``.

    ``devices``: those of ranks 0, 1, ..., over and over. ``side_stream``: what is on a CUDA stream of its own:
    ``"construction"`` of the DDP model, whose gradients are then accumulated there, ``"training"`` or ``"all"``.
    ``weights``: as ``devices``. ``switch``: the step from which on the mean is taken.
    """

    model: str = "mlp"
    steps: int = 12
    options: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    uneven: bool = False
    delays: bool = False
    record: bool = True
    devices: tuple[str, ...] = ("cpu",)
    side_stream: str = "none"
    weights: tuple[int, ...] = (1,)
    switch: int | None = None

    def device(self) -> str:
        """Of this rank."""
        return self.devices[dist.get_rank() % len(self.devices)]


@dataclass
class Outcome:
    """One rank's view: per step and parameter name its own gradient and the vote, both flat, in memory order."""

    local: list[dict[str, torch.Tensor]]
    voted: list[dict[str, torch.Tensor]]
    digest: str
    loss: float
    buckets: set[int]
    stats: dict[str, Any]


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,)).clone()


def digest(module: nn.Module) -> str:
    """Of the bits of all parameters."""
    sha = hashlib.sha256()
    for parameter in module.parameters():
        sha.update(in_memory_order(parameter).view(torch.uint8).cpu().numpy().tobytes())
    return sha.hexdigest()


def build(
    job: Job, state: MajorityVoteState | None = None
) -> tuple[DistributedDataParallel, MajorityVoteState, Outcome]:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(MODELS[job.model]().to(job.device()), **job.ddp)
    state = MajorityVoteState(**job.options) if state is None else state
    state.weight = job.weights[dist.get_rank() % len(job.weights)]
    if job.switch is not None:
        state.switch_to_dense(job.switch)
    state.name_parameters(ddp.module.named_parameters())
    outcome = Outcome([], [], "", 0.0, set(), {})
    names = {parameter: name for name, parameter in ddp.module.named_parameters()}

    def recording_hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP checks annotations
        outcome.buckets.add(bucket.index())
        if job.record:
            if bucket.index() == 0:
                outcome.local.append({})
            offset = 0
            for parameter in bucket.parameters():
                piece = bucket.buffer()[offset : offset + parameter.numel()]
                outcome.local[-1][names[parameter]] = piece.clone()
                offset += parameter.numel()
        return majority_vote_hook(state, bucket)

    ddp.register_comm_hook(state, recording_hook)
    return ddp, state, outcome


@contextmanager
def delayed_worker(generator: torch.Generator) -> Iterator[None]:
    """Every collective of this rank starts after a random delay."""
    run = Channel._run

    def late(self: Channel, *arguments: Any, **options: Any) -> None:
        time.sleep(0.001 * torch.rand((), generator=generator).item())
        run(self, *arguments, **options)

    Channel._run = late  # type: ignore[method-assign]
    try:
        yield
    finally:
        Channel._run = run  # type: ignore[method-assign]


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def batches(steps: int, rank: int, first: int = 0) -> Iterator[torch.Tensor]:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        yield torch.randn(6, 7, generator=generator)


def step(ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer, job: Job, x: torch.Tensor) -> float:
    optimizer.zero_grad(set_to_none=not job.ddp.get("gradient_as_bucket_view", False))
    for i in range(job.accumulate):
        with ddp.no_sync() if i + 1 < job.accumulate else nullcontext():
            loss = (ddp(x.to(job.device()) + 0.1 * i).float() - 0.5).square().mean()
            loss.backward()
    optimizer.step()
    return loss.item()


def train(job: Job) -> Outcome:
    """Train ``job`` on this rank."""
    from torch.distributed.algorithms.join import Join

    rank = dist.get_rank()
    side_stream = None if job.side_stream == "none" else torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def side_stream_for(part: str) -> AbstractContextManager[None]:
        return on_stream(side_stream) if side_stream and job.side_stream in ("all", part) else nullcontext()

    with side_stream_for("construction"):
        ddp, state, outcome = build(job)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    steps = job.steps - rank if job.uneven else job.steps
    generator = torch.Generator().manual_seed(rank)
    with (
        side_stream_for("training"),
        delayed_worker(generator) if job.delays else nullcontext(),
        Join([ddp]) if job.uneven else nullcontext(),
    ):
        for x in batches(steps, rank):
            outcome.loss = step(ddp, optimizer, job, x)
            if job.record:
                outcome.voted.append(
                    {name: in_memory_order(p.grad) for name, p in ddp.module.named_parameters() if p.grad is not None}
                )
    for recorded in outcome.local + outcome.voted:
        recorded.update({name: x.cpu() for name, x in recorded.items()})  # only now: it waits for the device
    outcome.digest = digest(ddp.module)
    outcome.stats = state.stats().as_dict()
    return outcome
