"""On what the methods are compared: the exchange of one bucket, and steps of whole models under DDP."""

# No `from __future__ import annotations` here: DDP compares the hook's annotations with the classes themselves.

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp.methods import NOOP, Hook, Method, Shape
from signvote.cli.demo import data, model
from signvote.cli.demo.settings import CONTEXT, SEQUENCES

LAYERS = 25  # of a million parameters each
BATCH = 8  # for each rank where the CPU computes: the step is then as short as one on an accelerator
SLEEP_SECONDS = 0.2  # in a step whose computation is simulated: a third of it forward, two thirds backward
ONE_BUCKET_MB = 1 << 20


class Workload(Protocol):
    """Something that each method can do, again and again, on the same gradients."""

    shapes: list[Shape]

    def prepare(self, method: Method) -> None:
        """What comes before :meth:`run` and is not timed."""

    def run(self, method: Method) -> None: ...

    def gradients(self, method: Method) -> list[Tensor]:
        """What the last run has left."""

    def state(self, method: Method) -> Any:
        """The state of the method's hook."""

    def buckets(self, method: Method) -> list[int]:
        """Coordinates of each, in the order in which they become ready."""


class Layer(nn.Module):
    """A million parameters: as many matrices as vectors, as in most models."""

    def __init__(self, inputs: int = 999) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000, inputs))
        self.bias = nn.Parameter(torch.zeros(1000))


class Exchange:
    """One bucket of ``coordinates``, a multiple of 1000, filled with random numbers that differ from rank to rank."""

    def __init__(self, coordinates: int) -> None:
        inputs = min(999, coordinates // 1000 - 1)
        module = nn.ModuleList(Layer(inputs) for _ in range(coordinates // (1000 * (inputs + 1))))
        self.module = module
        self.shapes = [tuple(parameter.shape) for parameter in module.parameters()]
        self._hooks: dict[Method, tuple[Hook, Any]] = {}
        self._bucket = bucket_of(module)
        self._own = torch.randn(coordinates, generator=torch.Generator().manual_seed(dist.get_rank()))
        if self._own.shape != self._bucket.buffer().shape:
            raise ValueError(f"exchange: expected a multiple of 1000 up to 1000000, or of 1000000, got {coordinates}")

    def prepare(self, method: Method) -> None:
        if method not in self._hooks:
            self._hooks[method] = method.new_hook(self.module)
        self._bucket.buffer().copy_(self._own)

    def run(self, method: Method) -> None:
        hook, state = self._hooks[method]
        hook(state, self._bucket).wait()

    def gradients(self, method: Method) -> list[Tensor]:
        return [self._bucket.buffer()]

    def state(self, method: Method) -> Any:
        return self._hooks[method][1]

    def buckets(self, method: Method) -> list[int]:
        return [self._bucket.buffer().numel()]


def bucket_of(module: nn.Module) -> Any:
    """The one bucket that DDP makes of all parameters, to be handed to hooks without DDP."""
    seen: list[Any] = []

    def keep(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        seen.append(bucket)
        return NOOP.new_hook(module)[0](None, bucket)

    ddp = DistributedDataParallel(_Sum(module), bucket_cap_mb=ONE_BUCKET_MB)
    ddp.register_comm_hook(None, keep)
    for _ in range(2):  # DDP lays its buckets anew after the first
        ddp().backward()
    module.zero_grad()  # they are not the bucket's memory
    return seen[-1]


class _Sum(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> Tensor:
        return torch.stack([parameter.sum() for parameter in self.module.parameters()]).sum()


class Steps:
    """Whole steps of a model under DDP: forward and backward pass, and the optimizer's step if it ``has_optimizer``."""

    def __init__(
        self, new_model: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]], has_optimizer: bool, **ddp: Any
    ) -> None:
        self._new = new_model
        self._has_optimizer = has_optimizer
        self._ddp_options = ddp
        self._models: dict[bool, _Model] = {}
        self._optimizers: dict[Method, torch.optim.Optimizer] = {}
        self.shapes = [tuple(parameter.shape) for parameter in self._model(NOOP).ddp.parameters()]

    def _model(self, method: Method) -> "_Model":
        if method.one_bucket not in self._models:
            torch.manual_seed(0)
            options: dict[str, Any] = {"bucket_cap_mb": ONE_BUCKET_MB} if method.one_bucket else {}
            module, loss = self._new()
            self._models[method.one_bucket] = _Model(
                DistributedDataParallel(module, **options, **self._ddp_options), loss
            )
        return self._models[method.one_bucket]

    def prepare(self, method: Method) -> None:
        found = self._model(method)
        found.use(method)
        if self._has_optimizer and method not in self._optimizers:
            self._optimizers[method] = method.optimizer(found.ddp)

    def run(self, method: Method) -> None:
        found = self._model(method)
        found.ddp.zero_grad()
        found.loss(found.ddp).backward()  # type: ignore[no-untyped-call]
        if self._has_optimizer:
            self._optimizers[method].step()

    def gradients(self, method: Method) -> list[Tensor]:
        return [parameter.grad for parameter in self._model(method).ddp.parameters() if parameter.grad is not None]

    def state(self, method: Method) -> Any:
        return self._model(method).hooks[method][1]

    def buckets(self, method: Method) -> list[int]:
        return self._model(method).buckets


class _Model:
    """A model under DDP whose hook can be changed from step to step."""

    def __init__(self, ddp: DistributedDataParallel, loss: Callable[[nn.Module], Tensor]) -> None:
        self.ddp = ddp
        self.loss = loss
        self.hooks: dict[Method, tuple[Hook, Any]] = {}
        self.buckets: list[int] = []
        ddp.register_comm_hook(self, _call_chosen)
        self.use(NOOP)
        for _ in range(2):  # DDP lays its buckets anew after the first
            loss(ddp).backward()  # type: ignore[no-untyped-call]

    def use(self, method: Method) -> None:
        if method not in self.hooks:
            self.hooks[method] = method.new_hook(self.ddp.module)
        self.chosen = self.hooks[method]


def _call_chosen(
    chooser: _Model,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    if bucket.index() == 0:
        chooser.buckets = []
    chooser.buckets.append(bucket.buffer().numel())
    hook, state = chooser.chosen
    return hook(state, bucket)


def cpu_model() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """25 million parameters, computed here."""
    x = torch.randn(BATCH, 1000, generator=torch.Generator().manual_seed(dist.get_rank()))
    return nn.Sequential(*(Residual() for _ in range(LAYERS))), lambda module: module(x).square().mean()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1000, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).relu()


def sleep_model() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """25 million parameters, whose computation leaves the CPU free."""
    start = torch.zeros((), requires_grad=True)
    return nn.Sequential(*(SleepingLayer(SLEEP_SECONDS / LAYERS) for _ in range(LAYERS))), lambda module: module(start)


class SleepingLayer(Layer):
    """Sleeps instead of computing; its gradients are random numbers made beforehand."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.own = [torch.randn(parameter.shape, generator=generator) for parameter in self.parameters()]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Sleep.apply(x, self, *self.parameters())  # type: ignore[no-untyped-call]
        return y


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, layer: SleepingLayer, *parameters: Tensor) -> Tensor:
        context.layer = layer
        time.sleep(layer.seconds / 3)
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        time.sleep(context.layer.seconds * 2 / 3)
        # Other objects over the same memory, which autograd then takes over instead of copying it.
        return gradients[0], None, *(own.detach() for own in context.layer.own)


def demo_model() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """The transformer of `signvote demo`, and one of its batches."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    pieces = data.sample(data.load_corpus().train, SEQUENCES, CONTEXT, generator)
    transformer = model.Transformer(context=CONTEXT)
    for parameter in transformer.parameters():
        if not parameter.any():  # as after the first step: with them at 0, most gradients are 0
            nn.init.normal_(parameter, std=1e-3)
    return transformer, lambda module: model.loss(module, pieces)


def coordinates_of(kind: str) -> int:
    """Of the models."""
    if kind == "demo":
        return sum(parameter.numel() for parameter in model.Transformer(context=CONTEXT).parameters())
    return LAYERS * {"sleep": 1000 * 1000, "cpu": 1000 * 1001}[kind]


def new_workload(kind: str, coordinates: int) -> Workload:
    if kind == "exchange":
        return Exchange(coordinates)
    if kind == "sleep":
        # The gradients are written where DDP wants them, as little work for the CPU as can be.
        return Steps(sleep_model, has_optimizer=False, gradient_as_bucket_view=True)
    return Steps({"cpu": cpu_model, "demo": demo_model}[kind], has_optimizer=True)
