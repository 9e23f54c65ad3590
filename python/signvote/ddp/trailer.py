"""The few words behind each shard of a message, and how a voter combines those of all ranks.

What a rank finds out while packing reaches every other rank in the same two messages that carry the bits, with no
further collective.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from signvote.ddp.layout import TRAILER_WORDS

#: A rank's vote counts as this many at most.
MAX_WEIGHT = 2**16 - 1

_MAX_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Trailer:
    """int32 words.

    ``nonfinite``: NaN or inf coordinates in the bucket, saturating; one rank's on the way to the voter, the sum over
    all ranks on the way back. ``first_rank``: 1 + the lowest rank that has any, 0 if none. ``undecided``: coordinates
    of the shard that were tied, or became zero, on the way back. ``tag``: which vote this is (see :func:`vote_tag`); 0
    on the way back if the ranks' tags differ. ``weight``: of the rank, and the sum over all on the way back.
    """

    nonfinite: int
    first_rank: int
    undecided: int
    tag: int
    weight: int

    def write(self, rows: npt.NDArray[np.int32]) -> None:
        """Put this trailer behind every row of a message."""
        nonfinite = min(self.nonfinite, _MAX_COUNT)
        rows[..., -TRAILER_WORDS:] = (nonfinite, self.first_rank, self.undecided, self.tag, self.weight, 0)


def vote_tag(step: int, bucket_index: int, numel: int) -> int:
    """A number from 1 to 2^31 - 1 that tells votes apart: ranks out of step would otherwise vote in silence."""
    return 1 + (step * 1_000_003 + bucket_index * 8_191 + numel) % _MAX_COUNT


def weight_of(row: npt.NDArray[np.int32], rank: int) -> int:
    """As :func:`weights_of`, of one row, which is that of ``rank``."""
    return int(weights_of(row[None], rank)[0])


def weights_of(received: npt.NDArray[np.int32], first_rank: int = 0) -> npt.NDArray[np.int64]:
    """The weight of each rank, one to a row."""
    weights: npt.NDArray[np.int64] = received[:, -TRAILER_WORDS + 4].astype(np.int64)
    for rank, weight in enumerate(weights.tolist(), first_rank):
        if not 1 <= weight <= MAX_WEIGHT:
            raise ValueError(f"weight: expected 1 to {MAX_WEIGHT}, got {weight} from rank {rank}: is it out of step?")
    return weights


def combine(received: npt.NDArray[np.int32], undecided: int) -> Trailer:
    """What a voter sends back, given the rows of all ranks, or their trailers."""
    nonfinite, first_rank, _, tag, weight, _ = received[:, -TRAILER_WORDS:].astype(np.int64).T
    senders = first_rank[first_rank > 0]
    return Trailer(
        nonfinite=int(nonfinite.sum()),
        first_rank=int(senders.min()) if senders.size else 0,
        undecided=min(undecided, _MAX_COUNT),
        tag=_common(tag),
        weight=int(weight.sum()),
    )


def read(voted: npt.NDArray[np.int32]) -> Trailer:
    """What a rank learns from the voted shards: flags are the same behind each of them, counts of shards add up."""
    nonfinite, first_rank, undecided, tag, weight, _ = voted[:, -TRAILER_WORDS:].astype(np.int64).T
    return Trailer(
        nonfinite=int(nonfinite.max()),
        first_rank=int(first_rank.max()),
        undecided=int(undecided.sum()),
        tag=_common(tag),
        weight=int(weight[0]),
    )


def _common(tags: npt.NDArray[np.int64]) -> int:
    return int(tags[0]) if (tags == tags[0]).all() else 0
