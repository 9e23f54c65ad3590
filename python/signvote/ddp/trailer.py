"""The few words behind each shard of a message, and how a voter combines those of all ranks.

What a rank finds out while packing reaches every other rank in the same two messages that carry the bits, with no
further collective.
"""

from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from signvote.ddp.layout import TRAILER_WORDS

#: A rank's vote counts as this many at most.
MAX_WEIGHT = 2**16 - 1

_MAX_COUNT = 2**31 - 1


class _Trailer:
    """int32 words, in the order of the fields; larger numbers saturate."""

    def write(self, rows: npt.NDArray[np.int32]) -> None:
        """Put this trailer behind every row of a message."""
        rows[..., -TRAILER_WORDS:] = [min(word, _MAX_COUNT) for word in astuple(self)]  # type: ignore[call-overload]


@dataclass(frozen=True)
class Sent(_Trailer):
    """What a rank says to the voters.

    ``nonfinite``: NaN or inf coordinates in its bucket. ``first_rank``: 1 + the rank if there are any, otherwise 0.
    ``weight``: as how many its vote counts. ``tag``: which vote this is, see :func:`vote_tag`.
    """

    nonfinite: int
    first_rank: int
    weight: int
    tag: int


@dataclass(frozen=True)
class Result(_Trailer):
    """What a voter says to the ranks.

    ``nonfinite``: the sum over all ranks. ``first_rank``: 1 + the lowest rank that has any. ``undecided``: coordinates
    of the shard that were tied, or became zero. ``tag``: that of all ranks, 0 if theirs differ.
    """

    nonfinite: int
    first_rank: int
    undecided: int
    tag: int


def vote_tag(step: int, bucket_index: int, numel: int) -> int:
    """A number from 1 to 2^31 - 1 that tells votes apart: ranks out of step would otherwise vote in silence."""
    return 1 + (step * 1_000_003 + bucket_index * 8_191 + numel) % _MAX_COUNT


def weights_of(received: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """The weight of each rank, from its row or trailer."""
    # Of a rank that is out of step it may be anything. The tag tells every rank of that.
    weights: npt.NDArray[np.int64] = _columns(received)[2].clip(1, MAX_WEIGHT)
    return weights


def combine(received: npt.NDArray[np.int32], undecided: int) -> Result:
    """What a voter sends back, given the rows of all ranks, or their trailers."""
    nonfinite, first_rank, _, tag = _columns(received)
    senders = first_rank[first_rank > 0]
    return Result(
        nonfinite=int(nonfinite.sum()),
        first_rank=int(senders.min()) if senders.size else 0,
        undecided=undecided,
        tag=_common(tag),
    )


def read(voted: npt.NDArray[np.int32]) -> Result:
    """What a rank learns from the voted shards: flags are the same behind each of them, counts of shards add up."""
    nonfinite, first_rank, undecided, tag = _columns(voted)
    return Result(
        nonfinite=int(nonfinite.max()),
        first_rank=int(first_rank.max()),
        undecided=int(undecided.sum()),
        tag=_common(tag),
    )


def _columns(rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    return rows[:, -TRAILER_WORDS:].astype(np.int64).T


def _common(tags: npt.NDArray[np.int64]) -> int:
    return int(tags[0]) if (tags == tags[0]).all() else 0
