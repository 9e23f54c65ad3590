"""Where each coordinate of a DDP bucket travels: arithmetic only, no communication.

A message is a matrix of words: one row per shard of the bucket. A row holds, one behind the other, the planes of sign
bits of the shard's voted coordinates (one, or two with abstention), its dense coordinates as they are, numbers, and a
trailer. Only how many planes there are differs between the way to the voters and the way back.

Every voted parameter starts at a multiple of 64 coordinates, so that its coins depend on its own place in the model and
not on the bucket that DDP happens to put it in: a rebuilt bucket or a resumed job draws the same coins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

#: Columns of a run, see ``csrc/runs.h``.
PLACE, FIRST, NUMEL, COORDINATE, WORD = range(5)

#: Words at the end of each row, see :mod:`signvote.ddp.trailer`.
TRAILER_WORDS = 4

CPU = torch.device("cpu")

_BLOCK = 64  # coordinates that share one draw of coins
_BLOCK_WORDS = 2
_WORD_BYTES = 4


@dataclass(frozen=True)
class Part:
    """A parameter of a bucket: its place in the model, and where its coordinates lie in the bucket's buffer."""

    place: int
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.begin

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The parameter's coordinates of a tensor that has all of the bucket's."""
        return flat[self.begin : self.end]


@dataclass(frozen=True)
class DensePiece:
    """Coordinates that lie together, in the bucket's buffer and in one row of the message."""

    coordinate: int
    shard: int
    offset: int
    numel: int


class BucketLayout:
    """Which shard of a bucket each coordinate belongs to.

    Args:
        numels: Coordinates of each parameter, in the order in which they lie in the bucket's buffer.
        places: Index in the model of each of those parameters.
        num_shards: Rows of a message.
        dense: Places of the parameters of which the mean is taken instead of the vote.
        itemsize: Bytes of a coordinate.
    """

    def __init__(
        self,
        numels: Sequence[int],
        places: Sequence[int],
        num_shards: int,
        *,
        dense: frozenset[int] = frozenset(),
        itemsize: int = 4,
    ) -> None:
        ends = np.cumsum([0, *numels]).tolist()
        parts = [Part(*part) for part in zip(places, ends[:-1], ends[1:], strict=True)]
        self.numel = sum(numels)
        self.num_shards = num_shards
        self.voted = [part for part in parts if part.numel and part.place not in dense]
        self.dense = [part for part in parts if part.numel and part.place in dense]

        self._shard_blocks = -(-sum(-(-part.numel // _BLOCK) for part in self.voted) // num_shards)
        #: Words of one plane of a shard.
        self.shard_words = self._shard_blocks * _BLOCK_WORDS
        # In blocks too: the row then keeps the alignment of whatever dtype.
        self.shard_dense = -(-self.dense_numel // (_BLOCK * num_shards)) * _BLOCK
        self.shard_dense_words = self.shard_dense * itemsize // _WORD_BYTES

    @property
    def voted_numel(self) -> int:
        return sum(part.numel for part in self.voted)

    @property
    def dense_numel(self) -> int:
        return sum(part.numel for part in self.dense)

    def runs(self, row_words: int) -> npt.NDArray[np.int64]:
        """The voted parameters cut where a shard ends, one run per row, in messages of rows of ``row_words``."""
        runs = []
        block = 0
        for part in self.voted:
            first = 0
            while first < part.numel:
                shard, offset = divmod(block, self._shard_blocks)
                length = min(part.numel - first, (self._shard_blocks - offset) * _BLOCK)
                runs.append((part.place, first, length, part.begin + first, shard * row_words + offset * _BLOCK_WORDS))
                first += length
                block += -(-length // _BLOCK)
        return np.array(runs, dtype=np.int64).reshape(-1, 5)

    def dense_pieces(self) -> Iterator[DensePiece]:
        """The dense parameters one after the other, cut where a shard ends; those that lie together are one piece."""
        spans: list[tuple[int, int]] = []
        for part in self.dense:
            begin = spans.pop()[0] if spans and spans[-1][1] == part.begin else part.begin
            spans.append((begin, part.end))
        position = 0
        for begin, end in spans:
            while begin < end:
                shard, offset = divmod(position, self.shard_dense)
                length = min(end - begin, self.shard_dense - offset)
                yield DensePiece(begin, shard, offset, length)
                begin += length
                position += length


class MessageLayout:
    """The messages of a bucket in one direction.

    Args:
        bucket: What they carry.
        num_planes: 1, or 2 where a coordinate can be zero: signs, and which of them count.
        num_numbers: float32 numbers in each row.

    Attributes:
        row_words: Words of a row.
        runs: int64, one run to a row: PLACE, FIRST, NUMEL, COORDINATE, WORD (in the whole message, of the plane of
            signs; that of the second plane is ``stride`` behind it).
    """

    def __init__(self, bucket: BucketLayout, num_planes: int = 1, num_numbers: int = 0) -> None:
        self.bucket = bucket
        self.num_planes, self.num_numbers = num_planes, num_numbers
        self.stride = bucket.shard_words
        self._dense_begin = num_planes * bucket.shard_words
        self._numbers_begin = self._dense_begin + bucket.shard_dense_words
        numbers_end = self._numbers_begin + num_numbers
        self.row_words = numbers_end + numbers_end % 2 + TRAILER_WORDS
        self.runs = bucket.runs(self.row_words)

    def shard_runs(self, shard: int) -> npt.NDArray[np.int64]:
        """The runs of one shard, with WORD counted from the start of its row."""
        runs: npt.NDArray[np.int64] = self.runs[self.runs[:, WORD] // self.row_words == shard]
        runs[:, WORD] -= shard * self.row_words
        return runs

    def new_message(self, rows: int | None = None, device: torch.device = CPU) -> torch.Tensor:
        """A zeroed int32 matrix of ``rows`` rows (default: one per shard). Padding is never written: it stays 0."""
        rows = self.bucket.num_shards if rows is None else rows
        return torch.zeros(rows, self.row_words, dtype=torch.int32, device=device)

    def words_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The sign bits of one row, or of each: one plane, or two one behind the other."""
        return rows[..., : self._dense_begin]

    def dense_of(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The dense coordinates of one row, or of each, padding included."""
        return rows[..., self._dense_begin : self._numbers_begin].view(dtype)

    def ends_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Numbers and trailer, and the padding between them, of one row, or of each."""
        return rows[..., self._numbers_begin :]

    def numbers_of(self, rows: torch.Tensor) -> npt.NDArray[np.float32]:
        """The numbers of one row in host memory, or of each; also given no more than its end."""
        begin = rows.shape[-1] - (self.row_words - self._numbers_begin)
        return rows[..., begin : begin + self.num_numbers].numpy().view(np.float32)
