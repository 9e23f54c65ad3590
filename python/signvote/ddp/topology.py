"""Who sends which bits to whom. All of them give every rank the same result, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from signvote.ddp.channel import Channel
from signvote.ddp.layout import MessageLayout


@dataclass
class Message:
    """Rows of words where the exchange wants them, and the ends of the rows where the host reads and writes them.

    Attributes:
        words: ``(rows, row_words)`` int32, in host memory or on a CUDA device.
        ends: Numbers and trailers. In host memory they are part of ``words``, otherwise a copy.
    """

    layout: MessageLayout
    words: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def new(cls, layout: MessageLayout, rows: int | None, device: torch.device) -> Message:
        """Zeroed; of as many rows as there are shards unless ``rows`` says otherwise."""
        words = layout.new_message(rows, device)
        ends = layout.ends_of(words)
        return cls(layout, words, torch.zeros(ends.shape, dtype=ends.dtype, device="cpu") if words.is_cuda else ends)

    def pin(self) -> None:
        """Move what is in host memory to where a CUDA device can copy it."""
        self.words = self.words.pin_memory()
        self.ends = self.layout.ends_of(self.words)

    def row(self, index: int) -> Message:
        return Message(self.layout, self.words[index : index + 1], self.ends[index : index + 1])

    def write_ends(self) -> None:
        """Bring the ends to the words; waits for a CUDA device."""
        if self.words.is_cuda:
            self.layout.ends_of(self.words).copy_(self.ends)

    def read_ends(self) -> None:
        """Bring the words' ends to the host; waits for a CUDA device."""
        if self.words.is_cuda:
            self.ends.copy_(self.layout.ends_of(self.words))


class Voter(Protocol):
    """How an exchange has its messages voted on."""

    def vote(self, received: Message, voted: Message) -> None:
        """The vote of the rows of ``received``, one from each rank, into the one row ``voted``."""

    def add(self, rank: int, message: torch.Tensor) -> None:
        """Count the row ``message`` from ``rank``, 0 first; for those that come one after another, in host memory."""

    def decide(self, voted: Message) -> None:
        """The vote of all that were added, into the one row ``voted``."""


class Exchange(Protocol):
    """One bucket's way to the voters and back, with the buffers it needs.

    Attributes:
        sent: This rank's message, one row per shard: packed into before :meth:`run`.
        result: The voted message, one row per shard: unpacked after :meth:`run`.
        shard: The shard on which this rank votes, None if it does not.
    """

    sent: Message
    result: Message
    shard: int | None

    def run(self, channel: Channel, voter: Voter) -> None: ...


class Sharded:
    """The paper's parameter server (Bernstein et al. 2018, Algorithm 3) spread over all ranks: rank k serves shard k.

    Each rank sends and receives 2·(M - 1)/M bits per coordinate.
    """

    def __init__(self, sent: MessageLayout, result: MessageLayout, rank: int, size: int, device: torch.device) -> None:
        self.shard: int | None = rank
        self.sent = Message.new(sent, None, device)
        self.received = Message.new(sent, size, device)
        self.result = Message.new(result, None, device)

    def run(self, channel: Channel, voter: Voter) -> None:
        self.sent.write_ends()
        channel.swap("exchange of signs", self.received.words, self.sent.words)
        self.received.read_ends()
        own = self.result.row(channel.rank)
        voter.vote(self.received, own)
        own.write_ends()
        channel.share("exchange of votes", self.result.words, own.words)
        self.result.read_ends()


class AllGather:
    """Every rank gets every message and votes on all of it: one collective, M - 1 bits per coordinate."""

    def __init__(self, sent: MessageLayout, result: MessageLayout, rank: int, size: int, device: torch.device) -> None:
        self.shard: int | None = 0
        self.sent = Message.new(sent, None, device)
        self.received = Message.new(sent, size, device)
        self.result = Message.new(result, None, device)

    def run(self, channel: Channel, voter: Voter) -> None:
        self.sent.write_ends()
        channel.share("exchange of signs", self.received.words, self.sent.words)
        self.received.read_ends()
        voter.vote(self.received, self.result)


class Server:
    """Bernstein et al. 2018, Algorithm 3 to the letter: rank 0 is the server.

    It counts each message as it arrives, while the next one is under way, so that its memory grows with log2(M) only.
    """

    def __init__(self, sent: MessageLayout, result: MessageLayout, rank: int, size: int, device: torch.device) -> None:
        self.shard: int | None = 0 if rank == 0 else None
        self.sent = Message.new(sent, None, device)
        self.result = Message.new(result, None, device)
        if rank == 0:
            self.received = sent.new_message(2)

    def run(self, channel: Channel, voter: Voter) -> None:
        if self.shard is None:
            channel.send_to_first(self.sent.words)
        else:
            for rank, message in channel.receive_in_turn(self.sent.words, self.received):
                voter.add(rank, message)
            voter.decide(self.result)
        channel.broadcast(self.result.words)


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


def new_exchange(
    topology: str, sent: MessageLayout, result: MessageLayout, rank: int, size: int, device: torch.device
) -> Exchange:
    """One whose messages are in the memory of ``device``."""
    exchanges: dict[str, Callable[[MessageLayout, MessageLayout, int, int, torch.device], Exchange]] = {
        "sharded": Sharded,
        "allgather": AllGather,
        "server": Server,
    }
    return exchanges[topology](sent, result, rank, size, device)
