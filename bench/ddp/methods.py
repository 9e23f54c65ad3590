"""What is compared: ways to bring the gradients of a bucket together, each a communication hook of DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks, powerSGD_hook

from signvote.ddp import MajorityVoteState, majority_vote_hook
from signvote.ddp.options import TOPOLOGIES
from signvote.ddp.topology import chosen
from signvote.optim import SignSGD

Hook = Callable[[Any, Any], torch.futures.Future[torch.Tensor]]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Method:
    """One way.

    Attributes:
        name: In tables and on the command line.
        result: What a bucket holds afterwards: the ``mean`` of all ranks, an ``approximation`` of it, the ``vote``, or
            what it held before (``own``).
        payload: Bytes that a rank sends, and that it receives, of parameters of these shapes among M ranks: of the rank
            that sends, or receives, most.
        new_hook: The hook and its state for a model.
        one_bucket: It needs all parameters in one bucket.
    """

    name: str
    result: str
    payload: Callable[[Iterable[Shape], int], float]
    new_hook: Callable[[nn.Module], tuple[Hook, Any]]
    one_bucket: bool = False

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """What its users have, with steps of zero length, so that all methods see the same gradients."""
        return (SignSGD if self.result == "vote" else torch.optim.SGD)(module.parameters(), lr=0.0)


def coordinates(shapes: Iterable[Shape]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def ring(workers: int) -> float:
    """What a rank sends in a ring all-reduce, and in a sharded vote, as a part of the data."""
    return 2 * (workers - 1) / workers


def _all_reduce(name: str, hook: Hook, bytes_per_coordinate: int) -> Method:
    return Method(
        name,
        "mean",
        lambda shapes, workers: ring(workers) * bytes_per_coordinate * coordinates(shapes),
        lambda module: (hook, dist.group.WORLD),
    )


def _power_sgd(rank: int) -> Method:
    def payload(shapes: Iterable[Shape], workers: int) -> float:
        numbers = 0
        for shape in shapes:
            rows, columns = shape[0], torch.Size(shape[1:]).numel()
            small = rank * (rows + columns)
            # It sends what would not shrink to half as it is: vectors for example.
            numbers += small if 2 * small < rows * columns else rows * columns
        return ring(workers) * 4 * numbers

    def new_hook(module: nn.Module) -> tuple[Hook, Any]:
        state = powerSGD_hook.PowerSGDState(dist.group.WORLD, rank, start_powerSGD_iter=2)
        state.iter = state.start_powerSGD_iter  # its first exchanges are plain all-reduces
        return powerSGD_hook.powerSGD_hook, state

    return Method(f"powersgd-{rank}", "approximation", payload, new_hook, one_bucket=True)


def _vote(topology: str, momentum: float) -> Method:
    def payload(shapes: Iterable[Shape], workers: int) -> float:
        # As of one bucket: of a model in several, "auto" may gather some and shard others. The bytes reported are those
        # that the state has counted; these are for the floor, and for what is skipped.
        numel = coordinates(shapes)
        return (ring(workers) if chosen(topology, numel, workers) == "sharded" else workers - 1) * numel / 8

    def new_hook(module: nn.Module) -> tuple[Hook, Any]:
        state = MajorityVoteState(momentum=momentum, topology=topology)
        state.name_parameters(module.named_parameters())
        return majority_vote_hook, state

    return Method(f"{topology}/{momentum:g}", "vote", payload, new_hook)


NOOP = Method("noop", "own", lambda shapes, workers: 0.0, lambda module: (debugging_hooks.noop_hook, None))

METHODS = {
    method.name: method
    for method in (
        NOOP,
        _all_reduce("fp32", default_hooks.allreduce_hook, 4),
        _all_reduce("fp16", default_hooks.fp16_compress_hook, 2),
        _power_sgd(1),
        _power_sgd(4),
        *(_vote(topology, momentum) for topology in TOPOLOGIES for momentum in (0.0, 0.9)),
    )
}
