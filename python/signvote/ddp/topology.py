"""Who sends which bits to whom. All three give every rank the same result, bit for bit."""

from collections.abc import Callable
from typing import Protocol

import torch

from signvote.ddp.channel import Channel
from signvote.ddp.layout import BucketLayout

#: vote(received, voted): the vote of the rows of ``received``, written into the one row ``voted``.
Vote = Callable[[torch.Tensor, torch.Tensor], None]


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

    def run(self, channel: Channel, vote: Vote) -> None: ...


class Sharded:
    """The paper's parameter server (Bernstein et al. 2018, Algorithm 3) spread over all ranks: rank k serves shard k.

    Each rank sends and receives 2·(M - 1)/M bits per coordinate.
    """

    def __init__(self, layout: BucketLayout, rank: int, size: int) -> None:
        self.shard: int | None = rank
        self.sent = layout.new_message()
        self.received = layout.new_message(size)
        self.voted = layout.new_message(1)
        self.result = layout.new_message()

    def run(self, channel: Channel, vote: Vote) -> None:
        channel.all_to_all(self.received, self.sent)
        vote(self.received, self.voted)
        channel.all_gather(self.result, self.voted)


class AllGather:
    """Every rank gets every message and votes on all of it: one collective, M - 1 bits per coordinate."""

    def __init__(self, layout: BucketLayout, rank: int, size: int) -> None:
        self.shard: int | None = 0
        self.sent = layout.new_message()
        self.received = layout.new_message(size)
        self.result = layout.new_message()

    def run(self, channel: Channel, vote: Vote) -> None:
        channel.all_gather(self.received, self.sent)
        vote(self.received, self.result)


class Server:
    """Bernstein et al. 2018, Algorithm 3 to the letter: rank 0 is the server."""

    def __init__(self, layout: BucketLayout, rank: int, size: int) -> None:
        self.shard: int | None = 0 if rank == 0 else None
        self.sent = layout.new_message()
        self.received = layout.new_message(size) if rank == 0 else None
        self.result = layout.new_message()

    def run(self, channel: Channel, vote: Vote) -> None:
        channel.gather(self.received, self.sent)
        if self.received is not None:
            vote(self.received, self.result)
        channel.broadcast(self.result)


def num_shards(topology: str, size: int) -> int:
    return size if topology == "sharded" else 1


def new_exchange(topology: str, layout: BucketLayout, rank: int, size: int) -> Exchange:
    exchanges: dict[str, Callable[[BucketLayout, int, int], Exchange]] = {
        "sharded": Sharded,
        "allgather": AllGather,
        "server": Server,
    }
    return exchanges[topology](layout, rank, size)
