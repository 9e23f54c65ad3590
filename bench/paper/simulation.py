"""Majority vote between workers that are simulated in this process.

The arithmetic is the hook's own: the same kernels, over the same runs, with the same coins. So the votes are those
that as many gloo ranks would have cast, bit for bit, in any topology.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from signvote import _core
from signvote.ddp.layout import COORDINATE, NUMEL, BucketLayout, MessageLayout
from signvote.ddp.options import Phase, VoteOptions
from signvote.runs import pack_runs, unpack_runs, vote_runs

_ZEROS, _TIES = range(2)  # what a coin is drawn for


class SimulatedVote:
    """Signum with majority vote between `workers`, on flat float32 gradients of parameters with these `numels`."""

    def __init__(self, numels: Sequence[int], workers: int, *, momentum: float, seed: int) -> None:
        self.options = VoteOptions(momentum=momentum, seed=seed)
        layout = MessageLayout(BucketLayout(numels, range(len(numels)), num_shards=1))
        self.runs = layout.runs
        self.words = layout.new_message(workers)
        self.voted = torch.zeros_like(self.words[0])
        self.momenta = torch.zeros(workers, layout.bucket.numel)
        self.step = self.ties = 0

    def vote(self, gradients: Tensor) -> Tensor:
        """The vote on `gradients`, one row for each worker: ±1."""
        self.step += 1
        options = self.options
        for worker, gradient in enumerate(gradients):
            pack_runs(
                gradient,
                self.momenta[worker] if options.has_momentum else None,
                options.coefficients(Phase.VOTE),
                self.runs,
                self.words[worker],
                zeros=options.zeros,
                seed=derive(options.seed, _ZEROS, self.step, worker),
            )
        seed = derive(options.seed, _TIES, self.step)
        self.ties += vote_runs(self.words, self.runs, self.voted, ties=options.ties, seed=seed)
        result = torch.empty_like(gradients[0])
        unpack_runs(self.voted, self.runs, result)
        return result


def shard_owners(numels: Sequence[int], workers: int) -> Tensor:
    """For each coordinate the worker that is its server in a sharded vote, if all are in one bucket in this order."""
    layout = MessageLayout(BucketLayout(numels, range(len(numels)), num_shards=workers))
    owners = torch.empty(layout.bucket.numel, dtype=torch.int64)
    for worker in range(workers):
        for run in layout.shard_runs(worker):
            owners[run[COORDINATE] : run[COORDINATE] + run[NUMEL]] = worker
    return owners


def derive(seed: int, *parts: int) -> int:
    """The hook's seed for one purpose."""
    for part in parts:
        seed = _core.mix((_core.mix(seed) + part) % 2**64)
    return seed
