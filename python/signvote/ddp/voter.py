"""What a rank does with the messages for its shard of a bucket: it votes, takes means, and combines trailers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from signvote.ddp import numbers, trailer
from signvote.ddp.layout import CPU, TRAILER_WORDS, MessageLayout
from signvote.ddp.options import VoteOptions
from signvote.ddp.stats import Counters
from signvote.ddp.topology import Message
from signvote.runs import vote_runs, vote_ternary_runs
from signvote.tally import VoteTally


class Voter:
    """The vote on one shard of one bucket, step after step in the same memory.

    Args:
        sent, result: The messages on both ways.
        shard: The shard on which this rank votes, None if it does not.
        size: How many ranks there are.
        dtype: Of the bucket.
        device: Where the messages are.
    """

    def __init__(
        self,
        sent: MessageLayout,
        result: MessageLayout,
        shard: int | None,
        size: int,
        dtype: torch.dtype,
        options: VoteOptions,
        counters: Counters,
        implementation: str | None,
        device: torch.device = CPU,
    ) -> None:
        self._sent, self._result = sent, result
        self._options, self._counters, self._implementation = options, counters, implementation
        self._runs = result.runs[:0] if shard is None else result.shard_runs(shard)
        self._dtype = dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._sum = torch.zeros(sent.bucket.shard_dense, dtype=wide, device=device)
        self._trailers = np.zeros((size, TRAILER_WORDS), np.int32)
        self._numbers = np.zeros((size, sent.num_numbers), np.float32)
        self._tally: VoteTally[torch.Tensor] | None = None
        self._seed, self._num_threads = 0, 1

    def begin(self, seed: int, num_threads: int) -> None:
        """The next vote: with the coins of ``seed``, on ``num_threads`` threads."""
        self._seed, self._num_threads = seed, num_threads

    def vote(self, received: Message, voted: Message) -> None:
        """As :class:`signvote.ddp.topology.Voter`."""
        if self._can_vote_on_all(trailer.weights_of(received.ends.numpy())):
            with self._timed():
                self._trailers[:] = received.ends[:, -TRAILER_WORDS:].numpy()
                self._numbers[:] = self._sent.numbers_of(received.ends)
                if len(self._sum):
                    for rank, message in enumerate(received.words):
                        self._add_dense(rank, message, 1)
                    self._finish_means(voted)
                rows, words = self._sent.words_of(received.words), self._result.words_of(voted.words.view(-1))
                self._finish_ends(self._vote_on_all(rows, words), voted)
        else:
            for rank, message in enumerate(received.words):
                self.add(rank, message)
            self.decide(voted)

    def add(self, rank: int, message: torch.Tensor) -> None:
        """As :class:`signvote.ddp.topology.Voter`."""
        with self._timed():
            (weight,) = trailer.weights_of(message[None].numpy()).tolist()
            if rank == 0 and self._tally is not None:
                self._tally.clear()
            if self._tally is None:
                self._tally = VoteTally(
                    32 * self._sent.stride,
                    len(self._trailers) * trailer.MAX_WEIGHT,
                    ternary=self._sent.num_planes == 2,
                )
            ballot = self._sent.words_of(message)
            if self._sent.num_planes == 2:
                ballot = ballot.view(2, self._sent.stride)
            self._tally.add(ballot, weight, **self._chosen)
            self._trailers[rank] = message[-TRAILER_WORDS:].numpy()
            self._numbers[rank] = self._sent.numbers_of(message)
            if len(self._sum):
                self._add_dense(rank, message, weight)

    def decide(self, voted: Message) -> None:
        """As :class:`signvote.ddp.topology.Voter`."""
        with self._timed():
            assert self._tally is not None
            words = self._result.words_of(voted.words.view(-1))
            if self._result.num_planes == 1:
                undecided = self._tally.decide_runs(self._runs, words, **self._ties, **self._chosen)
            else:
                undecided = self._tally.decide_ternary_runs(self._runs, words, **self._lead, **self._chosen)
            if len(self._sum):
                self._finish_means(voted)
            self._finish_ends(undecided, voted)

    def _can_vote_on_all(self, weights: npt.NDArray[np.int64]) -> bool:
        """Whether there is one op for votes of these weights."""
        return bool((weights == 1).all()) and self._sent.num_planes == self._result.num_planes

    def _vote_on_all(self, rows: torch.Tensor, words: torch.Tensor) -> int:
        """Vote on the planes in ``rows``; returns how many coordinates were tied or became zero."""
        if self._result.num_planes == 1:
            return vote_runs(rows, self._runs, words, **self._ties, **self._chosen)
        return vote_ternary_runs(rows, self._runs, words, **self._lead, **self._chosen)

    @property
    def _chosen(self) -> dict[str, Any]:
        return {"implementation": self._implementation, "num_threads": self._num_threads}

    @property
    def _ties(self) -> dict[str, Any]:
        return {"ties": self._options.ties, "seed": self._seed}

    @property
    def _lead(self) -> dict[str, Any]:
        votes = trailer.weights_of(self._trailers).sum()
        return {"stride": self._result.stride, "quorum": self._options.votes_to_lead(int(votes))}

    def _add_dense(self, rank: int, message: torch.Tensor, weight: int) -> None:
        if rank == 0:
            self._sum.zero_()
        dense = self._sent.dense_of(message, self._dtype).to(self._sum.dtype)
        self._sum.add_(dense if weight == 1 else dense * weight)  # never fused: the same bits on every CPU

    def _finish_means(self, voted: Message) -> None:
        votes = int(trailer.weights_of(self._trailers).sum())
        # By a tensor: instead of dividing by a number, torch would multiply by its inverse on a CUDA device.
        means = self._sum.div_(self._sum.new_full((), votes))
        self._result.dense_of(voted.words.view(-1), self._dtype).copy_(means)

    def _finish_ends(self, undecided: int, voted: Message) -> None:
        if self._numbers.size:
            weights = trailer.weights_of(self._trailers)
            self._result.numbers_of(voted.ends)[:] = numbers.mean(self._numbers, weights)
        trailer.combine(self._trailers, undecided).write(voted.ends.numpy())

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._counters.vote_seconds += time.perf_counter() - start
