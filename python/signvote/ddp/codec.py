"""How a bucket becomes the message that a rank sends, and the voted message the bucket, on whatever device.

For gloo a message lies in host memory, where the vote wants it too, whatever device the gradients are on. So its
exchange knows nothing of devices, and ranks of both kinds vote with each other. For NCCL it lies on the device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from signvote.ddp.ballot import PIECE, Ballot, BallotOps, cast, magnitudes
from signvote.ddp.layout import MessageLayout
from signvote.ddp.numbers import Numbers
from signvote.ddp.stats import Counters
from signvote.ddp.topology import Exchange


class DeviceError(RuntimeError):
    """A CUDA device failed; the message starts with the phase and the device."""


@dataclass(frozen=True)
class Packed:
    """What is known when a message is packed.

    Attributes:
        zeros: Coordinates without a vote of their own: that were exactly zero, or abstain.
        nonfinite: Coordinates that were NaN or inf.
        magnitudes: If the ballot asked for them.
    """

    zeros: int
    nonfinite: int
    magnitudes: Numbers


@dataclass(frozen=True)
class Layouts:
    """Of the messages of a bucket.

    Attributes:
        sent, result: On both ways.
        kept: Where the words of coordinates would lie whose momentum is kept up though nothing of it is sent, in a
            step that takes the mean of all.
    """

    sent: MessageLayout
    result: MessageLayout
    kept: MessageLayout


class Codec(BallotOps):
    """Packs one bucket into ``exchange.sent`` and unpacks ``exchange.result`` into it. It counts the time of both.

    Attributes:
        num_threads_of_worker: How many threads of the CPU the vote that :meth:`pack` began may use.
    """

    num_threads_of_worker = 1

    def __init__(self, layouts: Layouts, exchange: Exchange, counters: Counters) -> None:
        self._sent_layout, self._result_layout, self._kept_layout = layouts.sent, layouts.result, layouts.kept
        self._exchange, self._counters = exchange, counters

    @abstractmethod
    def on_device(self) -> AbstractContextManager[object]:
        """Where a thread calls CUDA: with another device current, CUDA would make itself at home there too."""

    def on_worker(self) -> AbstractContextManager[object]:
        """Where the worker thread calls CUDA."""
        return self.on_device()

    @abstractmethod
    def pack(self, bucket: torch.Tensor, momentum: torch.Tensor | None, ballot: Ballot, *, is_last: bool) -> None:
        """Begin to pack, on the thread that computes and after what it has begun; ``is_last`` bucket of its pass."""

    @abstractmethod
    def settle(self) -> None:
        """Wait until nothing is left to do of what :meth:`pack` began."""

    @abstractmethod
    def packed(self) -> Packed:
        """What was found, once it is settled."""

    @abstractmethod
    def unpack(self, bucket: torch.Tensor, *, scale: float | Sequence[float]) -> None:
        """Begin to unpack: ±``scale``, or what it says for each of the voted parameters, and the means."""

    @abstractmethod
    def progress(self, bucket: torch.Tensor) -> Callable[[], float]:
        """Begin Σ s·g over the voted coordinates, for the vote s and the rank's own gradient g: before :meth:`unpack`.

        What is returned waits for it, and is to be called before the next vote of the bucket is unpacked.
        """

    @abstractmethod
    def fill(self, bucket: torch.Tensor, value: float) -> None:
        """Begin to fill the bucket instead."""

    @abstractmethod
    def new_future(self) -> torch.futures.Future[Any]:
        """One whose callbacks call :meth:`hand_over` and return the bucket."""

    @abstractmethod
    def hand_over(self) -> None:
        """What the caller begins on the device from here on comes after all that was begun with the bucket."""

    @abstractmethod
    def _unpack_signs(self, words: torch.Tensor, target: torch.Tensor, scale: float) -> None:
        """The voted coordinates, from ``words`` in the memory of the device."""

    def _write(self, bucket: torch.Tensor, momentum: torch.Tensor | None, ballot: Ballot, words: torch.Tensor) -> None:
        """All of the message but what the host puts into it, to ``words`` in the memory of the device."""
        layout = self._sent_layout.bucket
        if layout.voted:
            cast(self, bucket, momentum, ballot, layout.voted)
        elif momentum is not None:
            self.keep(bucket, momentum, ballot.coefficients)
        if layout.dense:
            dense = self._sent_layout.dense_of(words, bucket.dtype)
            for piece in layout.dense_pieces():
                source = bucket[piece.coordinate : piece.coordinate + piece.numel]
                dense[piece.shard, piece.offset : piece.offset + piece.numel] = source

    def _magnitudes(self, bucket: torch.Tensor, ballot: Ballot) -> torch.Tensor | None:
        return magnitudes(bucket, self._sent_layout.bucket.voted, ballot) if ballot.has_magnitudes else None

    def _read(self, bucket: torch.Tensor, scale: float | Sequence[float], words: torch.Tensor) -> None:
        """The bucket, from ``words`` in the memory of the device."""
        layout = self._result_layout.bucket
        if layout.voted:
            self._unpack_signs(words, bucket, scale if isinstance(scale, float) else 1.0)
            if not isinstance(scale, float):
                for part, factor in zip(layout.voted, scale, strict=True):
                    part.of(bucket).mul_(factor)
        if layout.dense:
            dense = self._result_layout.dense_of(words, bucket.dtype)
            for piece in layout.dense_pieces():
                target = bucket[piece.coordinate : piece.coordinate + piece.numel]
                target.copy_(dense[piece.shard, piece.offset : piece.offset + piece.numel])

    def _progress(self, bucket: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        signs = torch.zeros_like(bucket)
        self._unpack_signs(words, signs, 1.0)
        sums = [piece.sum(dtype=torch.float64) for piece in torch.split(signs.mul_(bucket), PIECE)]
        return torch.stack(sums).sum()

    def _zeros(self, counted: int) -> int:
        """Coordinates without a vote: as the op counted them, with abstention all that are not active."""
        if self._sent_layout.num_planes == 1:
            return counted
        active = self._exchange.sent.words[:, self._sent_layout.stride : 2 * self._sent_layout.stride]
        return self._sent_layout.bucket.voted_numel - popcount(active)

    def _nonfinite_of(self, counted: int, dtype: torch.dtype) -> int:
        """Voted coordinates as the ops counted them, and dense ones; in a dense step all are dense."""
        layout = self._sent_layout
        found = counted if layout.bucket.voted else 0
        if layout.bucket.dense:
            found += int(torch.isfinite(layout.dense_of(self._exchange.sent.words, dtype)).logical_not().sum())
        return found

    def _mask(self, words: torch.Tensor, mask: torch.Tensor) -> None:
        """Take the votes out of ``words`` for which ``mask`` has none."""
        stride = self._sent_layout.stride
        active = mask[:, stride : 2 * stride]
        words[:, :stride].bitwise_and_(active)
        words[:, stride : 2 * stride].bitwise_and_(active)


_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def popcount(words: torch.Tensor) -> int:
    """How many bits of the int32 ``words`` are 1; waits for a CUDA device."""
    if not words.is_cuda:
        return int(_ONES[words.numpy().view(np.uint8)].sum(dtype=np.int64))
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return int(((nibbles + (nibbles >> 4)) & 0x0F0F0F0F).view(torch.uint8).sum())
