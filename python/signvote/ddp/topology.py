"""Who sends which bits to whom. All of them give every rank the same result, bit for bit."""

from collections.abc import Callable
from typing import Protocol

import torch

from signvote.ddp.channel import Channel
from signvote.ddp.layout import MessageLayout


class Voter(Protocol):
    """How an exchange has its messages voted on."""

    def vote(self, received: torch.Tensor, voted: torch.Tensor) -> None:
        """The vote of the rows of ``received``, one from each rank, into the one row ``voted``."""

    def add(self, rank: int, message: torch.Tensor) -> None:
        """Count the row ``message`` from ``rank``, 0 first; for those that come one after another."""

    def decide(self, voted: torch.Tensor) -> None:
        """The vote of all that were added, into the one row ``voted``."""


class Exchange(Protocol):
    """One bucket's way to the voters and back, with the buffers it needs.

    Attributes:
        sent: This rank's message, one row per shard: packed into before :meth:`run`.
        result: The voted message, one row per shard: unpacked after :meth:`run`.
        shard: The shard on which this rank votes, None if it does not.
    """

    sent: torch.Tensor
    result: torch.Tensor
    shard: int | None

    def run(self, channel: Channel, voter: Voter) -> None: ...


class Sharded:
    """The paper's parameter server (Bernstein et al. 2018, Algorithm 3) spread over all ranks: rank k serves shard k.

    Each rank sends and receives 2·(M - 1)/M bits per coordinate.
    """

    def __init__(self, sent: MessageLayout, result: MessageLayout, rank: int, size: int) -> None:
        self.shard: int | None = rank
        self.sent = sent.new_message()
        self.received = sent.new_message(size)
        self.result = result.new_message()

    def run(self, channel: Channel, voter: Voter) -> None:
        channel.swap("exchange of signs", self.received, self.sent)
        own = self.result[channel.rank : channel.rank + 1]
        voter.vote(self.received, own)
        channel.swap("exchange of votes", self.result, own.expand_as(self.result))


class AllGather:
    """Every rank gets every message and votes on all of it: one collective, M - 1 bits per coordinate."""

    def __init__(self, sent: MessageLayout, result: MessageLayout, rank: int, size: int) -> None:
        self.shard: int | None = 0
        self.sent = sent.new_message()
        self.received = sent.new_message(size)
        self.result = result.new_message()

    def run(self, channel: Channel, voter: Voter) -> None:
        channel.swap("exchange of signs", self.received, self.sent.expand_as(self.received))
        voter.vote(self.received, self.result)


class Server:
    """Bernstein et al. 2018, Algorithm 3 to the letter: rank 0 is the server.

    It counts each message as it arrives, while the next one is under way, so that its memory grows with log2(M) only.
    """

    def __init__(self, sent: MessageLayout, result: MessageLayout, rank: int, size: int) -> None:
        self.shard: int | None = 0 if rank == 0 else None
        self.sent = sent.new_message()
        self.result = result.new_message()
        if rank == 0:
            self.received = sent.new_message(2)

    def run(self, channel: Channel, voter: Voter) -> None:
        if self.shard is None:
            channel.send_to_first(self.sent)
        else:
            for rank, message in channel.receive_in_turn(self.sent, self.received):
                voter.add(rank, message)
            voter.decide(self.result)
        channel.broadcast(self.result)


#: ``"auto"`` sends this much more at most to save a phase: 1.3 ms at 100 Mb/s.
MORE_BYTES = 16 * 1024


def chosen(topology: str, numel: int, size: int) -> str:
    """The topology of a bucket of ``numel`` coordinates among ``size`` ranks, which are the same on all of them.

    That of ``"auto"`` is ``"allgather"`` where a rank then sends no more, or MORE_BYTES more at most: it has one phase
    where ``"sharded"`` has two. So it is for two ranks, and for small buckets.
    """
    if topology != "auto":
        return topology
    more = (size - 1) * (size - 2) * numel / (8 * size)  # of M - 1 and 2·(M - 1)/M bits per coordinate
    return "allgather" if more <= MORE_BYTES else "sharded"


def num_shards(topology: str, size: int) -> int:
    return size if topology == "sharded" else 1


def new_exchange(topology: str, sent: MessageLayout, result: MessageLayout, rank: int, size: int) -> Exchange:
    exchanges: dict[str, Callable[[MessageLayout, MessageLayout, int, int], Exchange]] = {
        "sharded": Sharded,
        "allgather": AllGather,
        "server": Server,
    }
    return exchanges[topology](sent, result, rank, size)
