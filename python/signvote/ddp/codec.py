"""How a bucket becomes the message that a rank sends, and the voted message the bucket: on the CPU, on a CUDA device.

A message lies in host memory, where gloo and the vote want it, whatever device the gradients are on. So the exchange
knows nothing of devices, and ranks of both kinds vote with each other.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from signvote import cuda_runs
from signvote.ddp.ballot import PIECE, Ballot, BallotOps, cast, magnitudes
from signvote.ddp.layout import MessageLayout
from signvote.ddp.options import Coefficients
from signvote.ddp.stats import Counters
from signvote.ddp.topology import Exchange
from signvote.runs import pack_runs, pack_ternary_runs, unpack_runs, unpack_ternary_runs


class DeviceError(RuntimeError):
    """A CUDA device failed; the message starts with the phase and the device."""


@dataclass(frozen=True)
class Packed:
    """What is known when a message is packed.

    Attributes:
        zeros: Coordinates without a vote of their own: that were exactly zero, or abstain.
        nonfinite: Coordinates that were NaN or inf.
        magnitudes: float32, if the ballot asked for them.
    """

    zeros: int
    nonfinite: int
    magnitudes: np.ndarray[Any, np.dtype[np.float32]]


class Codec(BallotOps):
    """Packs one bucket into ``exchange.sent`` and unpacks ``exchange.result`` into it. It counts the time of both.

    Args:
        sent, result: The messages on both ways.
        kept: Where the words of coordinates would lie whose momentum is kept up though nothing of it is sent, in a
            step that takes the mean of all.

    Attributes:
        num_threads_of_worker: How many threads of the CPU the vote that :meth:`pack` began may use.
    """

    num_threads_of_worker = 1

    def __init__(
        self, sent: MessageLayout, result: MessageLayout, kept: MessageLayout, exchange: Exchange, counters: Counters
    ) -> None:
        self._sent_layout, self._result_layout, self._kept_layout = sent, result, kept
        self._exchange, self._counters = exchange, counters

    @abstractmethod
    def on_device(self) -> AbstractContextManager[object]:
        """Where a thread calls CUDA: with another device current, CUDA would make itself at home there too."""

    @abstractmethod
    def pack(self, bucket: torch.Tensor, momentum: torch.Tensor | None, ballot: Ballot, *, is_last: bool) -> None:
        """Begin to pack, on the thread that computes and after what it has begun; ``is_last`` bucket of its pass."""

    @abstractmethod
    def packed(self) -> Packed:
        """Wait for the words."""

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
        active = self._exchange.sent[:, self._sent_layout.stride : 2 * self._sent_layout.stride]
        return self._sent_layout.bucket.voted_numel - popcount(active)

    def _nonfinite_of(self, counted: int, dtype: torch.dtype) -> int:
        """Voted coordinates as the ops counted them, and dense ones; in a dense step all are dense."""
        layout = self._sent_layout
        found = counted if layout.bucket.voted else 0
        if layout.bucket.dense:
            found += int(torch.isfinite(layout.dense_of(self._exchange.sent, dtype)).logical_not().sum())
        return found

    def _mask(self, words: torch.Tensor, mask: torch.Tensor) -> None:
        """Take the votes out of ``words`` for which ``mask`` has none."""
        stride = self._sent_layout.stride
        active = mask[:, stride : 2 * stride]
        words[:, :stride].bitwise_and_(active)
        words[:, stride : 2 * stride].bitwise_and_(active)


_NO_NUMBERS = np.zeros(0, np.float32)
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def popcount(words: torch.Tensor) -> int:
    """How many bits of the int32 ``words`` are 1."""
    return int(_ONES[words.numpy().view(np.uint8)].sum(dtype=np.int64))


@dataclass(frozen=True)
class Streams:
    """Of one CUDA device, those on which words leave it and come back, beside the backward pass."""

    leaving: torch.cuda.Stream
    returning: torch.cuda.Stream

    @classmethod
    def of(cls, device: torch.device) -> Streams:
        return cls(torch.cuda.Stream(device), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def new_codec(
    bucket: torch.Tensor,
    sent: MessageLayout,
    result: MessageLayout,
    kept: MessageLayout,
    exchange: Exchange,
    counters: Counters,
    *,
    streams: Streams | None,
    implementation: str | None,
) -> Codec:
    """The codec of ``bucket``; ``streams`` are those of its device if that is a CUDA device."""
    if streams is None:
        return CpuCodec(sent, result, kept, exchange, counters, implementation)
    return CudaCodec(bucket, sent, result, kept, exchange, counters, streams)


class CpuCodec(Codec):
    """What is begun is done when a call returns."""

    def __init__(
        self,
        sent: MessageLayout,
        result: MessageLayout,
        kept: MessageLayout,
        exchange: Exchange,
        counters: Counters,
        implementation: str | None,
    ) -> None:
        super().__init__(sent, result, kept, exchange, counters)
        self._implementation = implementation
        self._num_threads = 1
        self._scratch: torch.Tensor | None = None
        self._packed = Packed(0, 0, np.zeros(0, np.float32))
        self._zeros_counted = self._nonfinite = 0

    def on_device(self) -> AbstractContextManager[object]:
        return nullcontext()

    def pack(self, bucket: torch.Tensor, momentum: torch.Tensor | None, ballot: Ballot, *, is_last: bool) -> None:
        self._num_threads = torch.get_num_threads()  # of the thread that computes: torch has a setting for each
        # Beside the backward pass the worker thread takes no other CPU from it; after the last bucket it is over.
        self.num_threads_of_worker = self._num_threads if is_last else 1
        start = time.perf_counter()
        self._zeros_counted = self._nonfinite = 0
        self._write(bucket, momentum, ballot, self._exchange.sent)
        found = self._magnitudes(bucket, ballot)
        self._packed = Packed(
            zeros=self._zeros(self._zeros_counted),
            nonfinite=self._nonfinite_of(self._nonfinite, bucket.dtype),
            magnitudes=_NO_NUMBERS if found is None else found.numpy(),
        )
        self._counters.pack_seconds += time.perf_counter() - start

    @property
    def _chosen(self) -> dict[str, Any]:
        return {"implementation": self._implementation, "num_threads": self._num_threads}

    def _scratch_words(self, layout: MessageLayout) -> torch.Tensor:
        if self._scratch is None:
            self._scratch = layout.new_message()
        return self._scratch

    def keep(self, bucket: torch.Tensor, momentum: torch.Tensor, coefficients: Coefficients) -> None:
        layout = self._kept_layout
        words = self._scratch_words(layout).view(-1)
        _, self._nonfinite = pack_runs(
            bucket, momentum, coefficients, layout.runs, words, zeros="negative", seed=0, **self._chosen
        )

    def vote(self, x: torch.Tensor, momentum: torch.Tensor | None, ballot: Ballot) -> None:
        self._zeros_counted, nonfinite = pack_runs(
            x,
            momentum,
            ballot.coefficients,
            self._sent_layout.runs,
            self._exchange.sent.view(-1),
            zeros=ballot.zeros,
            seed=ballot.seed,
            **self._chosen,
        )
        self._nonfinite = max(self._nonfinite, nonfinite)

    def vote_or_abstain(self, x: torch.Tensor, threshold: float) -> None:
        nonfinite = self._pack_ternary(x, threshold, self._exchange.sent)
        self._nonfinite = max(self._nonfinite, nonfinite)

    def abstain_at_zeros_of(self, bucket: torch.Tensor) -> None:
        scratch = self._scratch_words(self._sent_layout)
        self._pack_ternary(bucket, 0.0, scratch)
        self._mask(self._exchange.sent, scratch)

    def _pack_ternary(self, x: torch.Tensor, threshold: float, words: torch.Tensor) -> int:
        layout = self._sent_layout
        _, nonfinite = pack_ternary_runs(
            x, layout.runs, words.view(-1), stride=layout.stride, threshold=threshold, **self._chosen
        )
        return nonfinite

    def packed(self) -> Packed:
        return self._packed

    def unpack(self, bucket: torch.Tensor, *, scale: float | Sequence[float]) -> None:
        start = time.perf_counter()
        self._num_threads = self.num_threads_of_worker
        self._read(bucket, scale, self._exchange.result)
        self._counters.unpack_seconds += time.perf_counter() - start

    def progress(self, bucket: torch.Tensor) -> Callable[[], float]:
        self._num_threads = self.num_threads_of_worker
        progress = float(self._progress(bucket, self._exchange.result))
        return lambda: progress

    def _unpack_signs(self, words: torch.Tensor, target: torch.Tensor, scale: float) -> None:
        layout = self._result_layout
        if layout.num_planes == 1:
            unpack_runs(words.view(-1), layout.runs, target, scale=scale, **self._chosen)
        else:
            unpack_ternary_runs(words.view(-1), layout.runs, layout.stride, target, scale=scale, **self._chosen)

    def fill(self, bucket: torch.Tensor, value: float) -> None:
        bucket.fill_(value)

    def new_future(self) -> torch.futures.Future[Any]:
        return torch.futures.Future()

    def hand_over(self) -> None:
        pass


# What :class:`CudaCodec` counts while momentum is kept up, while votes are packed, and in search of zeros.
_KEPT, _VOTED, _SEEN = range(3)


class CudaCodec(Codec):
    """Packs on the stream that is current; copies words to pinned memory on a second stream, and back on a third.

    Only :meth:`packed` waits for the device, on the worker thread. When it returns, the device has read the bucket, and
    nothing that was begun with what :meth:`pack` was given is left to do. What :meth:`unpack` and :meth:`fill` begin is
    waited for on the device alone: by the stream that is current in :meth:`hand_over`, and before the next message
    takes the place of the last.

    The worker thread is in :meth:`on_device` when it calls any of these.
    """

    def __init__(
        self,
        bucket: torch.Tensor,
        sent: MessageLayout,
        result: MessageLayout,
        kept: MessageLayout,
        exchange: Exchange,
        counters: Counters,
        streams: Streams,
    ) -> None:
        super().__init__(sent, result, kept, exchange, counters)
        self._streams = streams
        self._device, self._dtype = bucket.device, bucket.dtype
        with self.on_device():
            exchange.sent = exchange.sent.pin_memory()
            exchange.result = exchange.result.pin_memory()

            def table(layout: MessageLayout) -> cuda_runs.DeviceRuns:
                num_words = layout.bucket.num_shards * layout.row_words
                return cuda_runs.DeviceRuns.of(layout.runs, bucket.numel(), num_words, bucket.device)

            self._sent_runs = table(sent)
            self._result_runs = self._sent_runs if result is sent else table(result)
            self._kept_runs = self._sent_runs if kept is sent else table(kept)
            self._sent = bucket.new_zeros(exchange.sent.shape, dtype=torch.int32)
            self._scratch: torch.Tensor | None = None
            self._counts = bucket.new_zeros((3, 2), dtype=torch.int64)
            self._counts_here = torch.zeros(3, 2, dtype=torch.int64, device="cpu").pin_memory()
            self._counted: set[int] = set()  # rows of it, in the last message
            self._magnitudes_here: torch.Tensor | None = None
            self._progress_here: torch.Tensor | None = None
            with torch.cuda.stream(streams.returning):  # the caching allocator keeps its memory for that stream
                self._result = bucket.new_empty(exchange.result.shape, dtype=torch.int32)
            self._pack_began, self._pack_ended, self._sent_ready, self._unpack_began, self._unpack_ended = (
                torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
                for _ in range(5)
            )
        self._is_unpacking = self._is_result_here = False

    def on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device)

    def pack(self, bucket: torch.Tensor, momentum: torch.Tensor | None, ballot: Ballot, *, is_last: bool) -> None:
        self.num_threads_of_worker = torch.get_num_threads()  # a backward pass on the device leaves the CPU free
        with self._phase("packing"), self.on_device():
            stream, leaving = torch.cuda.current_stream(), self._streams.leaving
            self._pack_began.record(stream)
            self._counted.clear()
            self._write(bucket, momentum, ballot, self._sent)
            found = self._magnitudes(bucket, ballot)
            if found is not None and self._magnitudes_here is None:
                self._magnitudes_here = torch.zeros(found.shape, dtype=torch.float32, device="cpu").pin_memory()
            self._pack_ended.record(stream)
            leaving.wait_event(self._pack_ended)
            leaving.wait_event(self._unpack_ended)  # of the last message: the device has read exchange.result
            with torch.cuda.stream(leaving):
                self._exchange.sent.copy_(self._sent, non_blocking=True)
                self._counts_here.copy_(self._counts, non_blocking=True)
                if found is not None and self._magnitudes_here is not None:
                    self._magnitudes_here.copy_(found, non_blocking=True)
                    found.record_stream(leaving)
                self._sent_ready.record(leaving)

    def keep(self, bucket: torch.Tensor, momentum: torch.Tensor, coefficients: Coefficients) -> None:
        cuda_runs.pack_runs(
            bucket,
            momentum,
            coefficients,
            self._kept_runs,
            self._scratch_words(self._kept_layout).view(-1),
            self._count(_KEPT),
            zeros="negative",
            seed=0,
        )

    def vote(self, x: torch.Tensor, momentum: torch.Tensor | None, ballot: Ballot) -> None:
        cuda_runs.pack_runs(
            x,
            momentum,
            ballot.coefficients,
            self._sent_runs,
            self._sent.view(-1),
            self._count(_VOTED),
            zeros=ballot.zeros,
            seed=ballot.seed,
        )

    def vote_or_abstain(self, x: torch.Tensor, threshold: float) -> None:
        self._pack_ternary(x, threshold, self._sent, self._count(_VOTED))

    def abstain_at_zeros_of(self, bucket: torch.Tensor) -> None:
        scratch = self._scratch_words(self._sent_layout)
        self._pack_ternary(bucket, 0.0, scratch, self._count(_SEEN))
        self._mask(self._sent, scratch)

    def _pack_ternary(self, x: torch.Tensor, threshold: float, words: torch.Tensor, counts: torch.Tensor) -> None:
        cuda_runs.pack_ternary_runs(
            x, self._sent_runs, words.view(-1), counts, stride=self._sent_layout.stride, threshold=threshold
        )

    def _count(self, row: int) -> torch.Tensor:
        self._counted.add(row)
        return self._counts[row]

    def _scratch_words(self, layout: MessageLayout) -> torch.Tensor:
        if self._scratch is None:
            self._scratch = self._sent.new_zeros((layout.bucket.num_shards, layout.row_words))
        return self._scratch

    def packed(self) -> Packed:
        with self._phase("packing"):
            self._sent_ready.synchronize()
            self._counters.pack_seconds += 1e-3 * self._pack_began.elapsed_time(self._sent_ready)
            if self._is_unpacking:
                self._counters.unpack_seconds += 1e-3 * self._unpack_began.elapsed_time(self._unpack_ended)
                self._is_unpacking = False
        self._is_result_here = False
        nonfinite = max((int(self._counts_here[row, 1]) for row in self._counted), default=0)
        return Packed(
            zeros=self._zeros(int(self._counts_here[_VOTED, 0])),
            nonfinite=self._nonfinite_of(nonfinite, self._dtype),
            magnitudes=_NO_NUMBERS if self._magnitudes_here is None else self._magnitudes_here.numpy(),
        )

    def unpack(self, bucket: torch.Tensor, *, scale: float | Sequence[float]) -> None:
        with self._unpacking(bucket):
            self._fetch()
            self._read(bucket, scale, self._result)

    def progress(self, bucket: torch.Tensor) -> Callable[[], float]:
        with self._unpacking(bucket):
            self._fetch()
            if self._progress_here is None:
                self._progress_here = torch.zeros((), dtype=torch.float64, device="cpu").pin_memory()
            here = self._progress_here.copy_(self._progress(bucket, self._result), non_blocking=True)

        def progress() -> float:
            with self._phase("unpacking"), self.on_device():
                self._unpack_ended.synchronize()
            return float(here)

        return progress

    def _fetch(self) -> None:
        """The result, once."""
        if not self._is_result_here:
            self._result.copy_(self._exchange.result, non_blocking=True)
            self._is_result_here = True

    def _unpack_signs(self, words: torch.Tensor, target: torch.Tensor, scale: float) -> None:
        layout = self._result_layout
        if layout.num_planes == 1:
            cuda_runs.unpack_runs(words.view(-1), self._result_runs, target, scale=scale)
        else:
            cuda_runs.unpack_ternary_runs(words.view(-1), self._result_runs, layout.stride, target, scale=scale)

    def fill(self, bucket: torch.Tensor, value: float) -> None:
        with self._unpacking(bucket):
            bucket.fill_(value)

    @contextmanager
    def _unpacking(self, bucket: torch.Tensor) -> Iterator[None]:
        returning = self._streams.returning
        with self._phase("unpacking"), torch.cuda.stream(returning):
            if not self._is_unpacking:
                self._unpack_began.record(returning)
            try:
                yield
            finally:  # whatever was begun before an error
                self._unpack_ended.record(returning)
                bucket.record_stream(returning)  # DDP may free it before this is done, and it is another stream's
                self._is_unpacking = True

    def new_future(self) -> torch.futures.Future[Any]:
        return torch.futures.Future(devices=[self._device])

    def hand_over(self) -> None:
        with self._phase("unpacking"):
            torch.cuda.current_stream().wait_event(self._unpack_ended)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DeviceError(f"{name} on {self._device}: {error}") from error
