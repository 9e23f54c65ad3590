"""Nothing drifts: votes without signal average to zero, at the even numbers of ranks that real jobs have."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import reference
import signvote
from ranks import RankPool
from signvote.ddp import attach


@pytest.mark.parametrize("world", [2, 4, 8])
def test_mean_vote_of_noise_is_zero(world: int) -> None:
    steps, numel = 50, 20_000
    generator = torch.Generator().manual_seed(world)
    total = 0.0
    for step in range(steps):
        words = [signvote.pack_signs(torch.randn(numel, generator=generator)) for _ in range(world)]
        votes = signvote.majority_vote(words, numel=numel, ties="coin", seed=reference.mix(step))
        total += signvote.unpack_signs(votes, numel).sum().item()
    assert abs(total / (steps * numel)) < 3 / math.sqrt(steps * numel)


class Dead(nn.Module):
    """Ten thousand coordinates that never get a gradient other than zero, and one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.dead = nn.Parameter(torch.zeros(10_000))
        self.alive = nn.Parameter(torch.zeros(()))

    def forward(self) -> torch.Tensor:
        return (0.0 * self.dead).sum() + self.alive


def walk(steps: int) -> tuple[float, float]:
    """Mean position of the dead coordinates after `steps` unit steps, and the greatest number of ranks' difference."""
    ddp = DistributedDataParallel(Dead())
    attach(ddp)
    position = torch.zeros(10_000)
    for _ in range(steps):
        ddp.zero_grad()
        ddp().backward()
        position -= ddp.module.dead.grad
    others = [torch.zeros_like(position) for _ in range(dist.get_world_size())]
    dist.all_gather(others, position)
    return position.mean().item(), max((position - other).abs().max().item() for other in others)


def test_dead_coordinates_do_not_drift(ranks: RankPool) -> None:
    steps = 4000
    for mean, difference in ranks.run(walk, steps, world=2):
        # each coordinate is a random walk of unit steps: standard error sqrt(steps / coordinates)
        assert abs(mean) < 3 * math.sqrt(steps / 10_000)
        assert difference == 0.0


def fade(steps: int) -> list[float]:
    """A coordinate that got one gradient, then none: how its vote averages long after."""
    ddp = DistributedDataParallel(Dead())
    attach(ddp, momentum=0.9)
    position = torch.zeros(10_000)
    for step in range(steps):
        ddp.zero_grad()
        (ddp() + (ddp.module.dead.sum() if step == 0 else 0.0)).backward()
        if step >= steps // 2:
            position += ddp.module.dead.grad
    return [position.mean().item(), math.sqrt(steps // 2 / 10_000)]


def test_momentum_that_fades_ends_in_coins(ranks: RankPool) -> None:
    """β^k underflows: stuck at the smallest subnormal it would vote one way for ever."""
    for mean, error in ranks.run(fade, 2400, world=2):
        assert abs(mean) < 3 * error
