"""What a state has done so far."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class VoteStats:
    """Counters of one rank since its state was made; see :meth:`signvote.ddp.MajorityVoteState.stats`.

    Attributes:
        calls: Buckets handed to the hook. 0 after a backward pass means that the hook is not registered: some
            frameworks drop hooks without a word.
        steps: Backward passes in which the hook was called.
        coordinates: Gradient coordinates that were voted on. Those of which the mean was taken are not among them.
        bytes_sent, bytes_received: Payload handed to the collectives for other ranks, and taken from them.
        pack_seconds, exchange_seconds, vote_seconds, unpack_seconds: Time in each phase. Exchange and vote run on the
            worker thread beside the backward pass; exchange includes waiting for slower ranks. For gradients on a CUDA
            device, pack and unpack are the device's time, by its events: from the start of packing until the words
            are in host memory, and from the start of the words' way back until the bucket is written. The latter is
            read when the bucket is packed again: each bucket's last vote is not yet in it, and never will be if DDP
            then rebuilds its buckets, a checkpoint is loaded or the group is made anew.
        codec_nanoseconds_per_coordinate: Time to pack, vote and unpack over ``coordinates``: what the compression
            itself costs. 1 is a millisecond for a million coordinates.
        zero_rate: Share of this rank's coordinates that were exactly zero when packed; with abstention, on which it
            had no vote.
        tie_rate: Share of coordinates on which the ranks tied; with a quorum, that became zero. The same on every rank.
        nonfinite: NaN or inf coordinates met, summed over all ranks; the same on every rank.
    """

    calls: int = 0
    steps: int = 0
    coordinates: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    pack_seconds: float = 0.0
    exchange_seconds: float = 0.0
    vote_seconds: float = 0.0
    unpack_seconds: float = 0.0
    codec_nanoseconds_per_coordinate: float = 0.0
    zero_rate: float = 0.0
    tie_rate: float = 0.0
    nonfinite: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The same as a plain dict, for a logger or JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ParameterStats:
    """How far the ranks agreed on one parameter; see :meth:`signvote.ddp.MajorityVoteState.stats`.

    Attributes:
        agreement: Share of coordinates on which a rank's vote is the outcome, the mean over all ranks.
        margin: By what share of all votes the outcome led, the mean over the parameter's coordinates.
    """

    agreement: float
    margin: float


@dataclass
class Traffic:
    """What has gone over a channel. One thread writes it."""

    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0


@dataclass
class Counters:
    """What :class:`VoteStats` is made from.

    The thread that packs writes the first group, the worker the last; the time to pack is written by the thread that
    knows it, which is the worker on a CUDA device.
    """

    calls: int = 0
    steps: int = 0
    coordinates: int = 0

    pack_seconds: float = 0.0

    zeros: int = 0
    voted: int = 0
    ties: int = 0
    nonfinite: int = 0
    vote_seconds: float = 0.0
    unpack_seconds: float = 0.0

    def stats(self, traffic: Traffic) -> VoteStats:
        codec_seconds = self.pack_seconds + self.vote_seconds + self.unpack_seconds
        return VoteStats(
            calls=self.calls,
            steps=self.steps,
            coordinates=self.coordinates,
            bytes_sent=traffic.bytes_sent,
            bytes_received=traffic.bytes_received,
            pack_seconds=self.pack_seconds,
            exchange_seconds=traffic.seconds,
            vote_seconds=self.vote_seconds,
            unpack_seconds=self.unpack_seconds,
            codec_nanoseconds_per_coordinate=1e9 * codec_seconds / max(1, self.coordinates),
            zero_rate=self.zeros / max(1, self.coordinates),
            tie_rate=self.ties / max(1, self.voted),
            nonfinite=self.nonfinite,
        )
