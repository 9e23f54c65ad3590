"""Where each coordinate of a DDP bucket travels: arithmetic only, no communication.

The message of a bucket is a matrix of words: one row per shard, each row ``shard_words`` words of sign bits followed by
a trailer. Every parameter starts at a multiple of 64 coordinates, so that its coins depend on its own place in the
model and not on the bucket that DDP happens to put it in: a rebuilt bucket or a resumed job draws the same coins.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

#: Columns of a run, see ``csrc/runs.h``.
PLACE, FIRST, NUMEL, COORDINATE, WORD = range(5)

_BLOCK = 64  # coordinates that share one draw of coins
_BLOCK_WORDS = 2


class BucketLayout:
    """The runs of one bucket: contiguous pieces of its parameters, cut where a shard of the message ends.

    Args:
        numels: Coordinates of each parameter, in the order in which they lie in the bucket's buffer.
        places: Index in the model of each of those parameters.
        num_shards: Rows of the message.
        trailer_words: Words at the end of each row.
    """

    def __init__(self, numels: Sequence[int], places: Sequence[int], num_shards: int, trailer_words: int) -> None:
        self.numel = sum(numels)
        blocks = sum(-(-numel // _BLOCK) for numel in numels)
        shard_blocks = max(1, -(-blocks // num_shards))
        self.num_shards = num_shards
        self.shard_words = shard_blocks * _BLOCK_WORDS
        self.row_words = self.shard_words + trailer_words

        runs = []
        coordinate = block = 0
        for numel, place in zip(numels, places, strict=True):
            first = 0
            while first < numel:
                shard, offset = divmod(block, shard_blocks)
                length = min(numel - first, (shard_blocks - offset) * _BLOCK)
                word = shard * self.row_words + offset * _BLOCK_WORDS
                runs.append((place, first, length, coordinate, word))
                first += length
                coordinate += length
                block += -(-length // _BLOCK)
        #: int64, one row per run: PLACE, FIRST, NUMEL, COORDINATE, WORD (in the whole message).
        self.runs: npt.NDArray[np.int64] = np.array(runs, dtype=np.int64).reshape(-1, 5)

    def shard_runs(self, shard: int) -> npt.NDArray[np.int64]:
        """The runs of one shard, with WORD counted from the start of its row."""
        runs: npt.NDArray[np.int64] = self.runs[self.runs[:, WORD] // self.row_words == shard]
        runs[:, WORD] -= shard * self.row_words
        return runs

    def new_message(self, rows: int | None = None) -> torch.Tensor:
        """A zeroed int32 matrix of ``rows`` rows (default: one per shard). Padding is never written: it stays 0."""
        rows = self.num_shards if rows is None else rows
        return torch.zeros(rows, self.row_words, dtype=torch.int32, device="cpu")
