"""The few words behind each shard of a message, and how a voter combines those of all ranks.

What a rank finds out while packing reaches every other rank in the same two messages that carry the bits, with no
further collective.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TRAILER_WORDS = 4

_MAX_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Trailer:
    """Four int32 words.

    ``nonfinite``: NaN or inf coordinates in the bucket, saturating; one rank's on the way to the voter, the sum over
    all ranks on the way back. ``first_rank``: 1 + the lowest rank that has any, 0 if none. ``ties``: tied coordinates
    of the shard, on the way back. ``tag``: which vote this is (see :func:`vote_tag`); 0 on the way back if the ranks'
    tags differ.
    """

    nonfinite: int
    first_rank: int
    ties: int
    tag: int

    def write(self, rows: npt.NDArray[np.int32]) -> None:
        """Put this trailer behind every row of a message."""
        rows[..., -TRAILER_WORDS:] = (min(self.nonfinite, _MAX_COUNT), self.first_rank, self.ties, self.tag)


def vote_tag(step: int, bucket_index: int, numel: int) -> int:
    """A number from 1 to 2^31 - 1 that tells votes apart: ranks out of step would otherwise vote in silence."""
    return 1 + (step * 1_000_003 + bucket_index * 8_191 + numel) % _MAX_COUNT


def combine(received: npt.NDArray[np.int32], ties: int) -> Trailer:
    """What a voter sends back, given the rows of all ranks."""
    nonfinite, first_rank, _, tag = received[:, -TRAILER_WORDS:].astype(np.int64).T
    senders = first_rank[first_rank > 0]
    return Trailer(
        nonfinite=int(nonfinite.sum()),
        first_rank=int(senders.min()) if senders.size else 0,
        ties=min(ties, _MAX_COUNT),
        tag=int(tag[0]) if (tag == tag[0]).all() else 0,
    )


def read(voted: npt.NDArray[np.int32]) -> Trailer:
    """What a rank learns from the voted shards: flags are the same behind each of them, ties add up."""
    nonfinite, first_rank, ties, tag = voted[:, -TRAILER_WORDS:].astype(np.int64).T
    return Trailer(
        nonfinite=int(nonfinite.max()),
        first_rank=int(first_rank.max()),
        ties=int(ties.sum()),
        tag=int(tag[0]) if (tag == tag[0]).all() else 0,
    )
