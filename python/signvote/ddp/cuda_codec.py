"""Packing and unpacking on a CUDA device, and the way of the words between it and the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from signvote import cuda_runs
from signvote.ddp.ballot import Ballot
from signvote.ddp.codec import Codec, DeviceError, Layouts, Packed
from signvote.ddp.layout import MessageLayout
from signvote.ddp.numbers import NO_NUMBERS
from signvote.ddp.options import Coefficients
from signvote.ddp.stats import Counters
from signvote.ddp.topology import Exchange


@dataclass(frozen=True)
class Streams:
    """Of one CUDA device, beside that of the backward pass: those on which words leave it and come back.

    On ``exchanging`` messages travel that are on the device.
    """

    leaving: torch.cuda.Stream
    returning: torch.cuda.Stream
    exchanging: torch.cuda.Stream

    @classmethod
    def of(cls, device: torch.device) -> Streams:
        return cls(*(torch.cuda.Stream(device) for _ in range(3)))  # type: ignore[no-untyped-call]


# What :class:`CudaCodec` counts while momentum is kept up, while votes are packed, and in search of zeros.
_KEPT, _VOTED, _SEEN = range(3)


class CudaCodec(Codec):
    """Packs on the stream that is current; copies words to pinned memory on a second stream, and back on a third.

    Only :meth:`settle` waits for the device, on the worker thread. When it returns, the device has read the bucket, and
    nothing that was begun with what :meth:`pack` was given is left to do. What :meth:`unpack` and :meth:`fill` begin is
    waited for on the device alone: by the stream that is current in :meth:`hand_over`, and before the next message
    takes the place of the last.

    The worker thread is in :meth:`on_device` when it calls any of these.
    """

    def __init__(
        self, bucket: torch.Tensor, layouts: Layouts, exchange: Exchange, counters: Counters, streams: Streams
    ) -> None:
        super().__init__(layouts, exchange, counters)
        self._streams = streams
        self._device, self._dtype = bucket.device, bucket.dtype
        with self.on_device():

            def table(layout: MessageLayout) -> cuda_runs.DeviceRuns:
                num_words = layout.bucket.num_shards * layout.row_words
                return cuda_runs.DeviceRuns.of(layout.runs, bucket.numel(), num_words, bucket.device)

            self._sent_runs = table(layouts.sent)
            self._result_runs = self._sent_runs if layouts.result is layouts.sent else table(layouts.result)
            self._kept_runs = self._sent_runs if layouts.kept is layouts.sent else table(layouts.kept)
            self._scratch: torch.Tensor | None = None
            self._counts = bucket.new_zeros((3, 2), dtype=torch.int64)
            self._counts_here = torch.zeros(3, 2, dtype=torch.int64, device="cpu").pin_memory()
            self._counted: set[int] = set()  # rows of it, in the last message
            self._magnitudes_here: torch.Tensor | None = None
            self._progress_here: torch.Tensor | None = None
            self._sent, self._result = self._new_words(bucket)
            self._pack_began, self._pack_ended, self._sent_ready, self._unpack_began, self._unpack_ended = (
                torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
                for _ in range(5)
            )
        self._is_unpacking = self._is_result_here = False

    def _new_words(self, bucket: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the device has the words of both ways."""
        self._exchange.sent.pin()
        self._exchange.result.pin()
        sent = bucket.new_zeros(self._exchange.sent.words.shape, dtype=torch.int32)
        with torch.cuda.stream(self._streams.returning):  # the caching allocator keeps its memory for that stream
            return sent, bucket.new_empty(self._exchange.result.words.shape, dtype=torch.int32)

    def _send(self) -> None:
        """To the exchange, on the stream that is current."""
        self._exchange.sent.words.copy_(self._sent, non_blocking=True)

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
                self._send()
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

    def settle(self) -> None:
        with self._phase("packing"):
            self._sent_ready.synchronize()
            self._counters.pack_seconds += 1e-3 * self._pack_began.elapsed_time(self._sent_ready)
            if self._is_unpacking:
                self._counters.unpack_seconds += 1e-3 * self._unpack_began.elapsed_time(self._unpack_ended)
                self._is_unpacking = False
        self._is_result_here = False

    def packed(self) -> Packed:
        nonfinite = max((int(self._counts_here[row, 1]) for row in self._counted), default=0)
        return Packed(
            zeros=self._zeros(int(self._counts_here[_VOTED, 0])),
            nonfinite=self._nonfinite_of(nonfinite, self._dtype),
            magnitudes=NO_NUMBERS if self._magnitudes_here is None else self._magnitudes_here.numpy(),
        )

    def unpack(self, bucket: torch.Tensor, *, scale: float | Sequence[float]) -> None:
        with self._unpacking(bucket):
            self._make_ready()
            self._read(bucket, scale, self._result)

    def progress(self, bucket: torch.Tensor) -> Callable[[], float]:
        with self._unpacking(bucket):
            self._make_ready()
            if self._progress_here is None:
                self._progress_here = torch.zeros((), dtype=torch.float64, device="cpu").pin_memory()
            here = self._progress_here.copy_(self._progress(bucket, self._result), non_blocking=True)

        def progress() -> float:
            with self._phase("unpacking"), self.on_device():
                self._unpack_ended.synchronize()
            return float(here)

        return progress

    def _make_ready(self) -> None:
        """Have the result to be read on the stream that is current."""
        if not self._is_result_here:  # copied once
            self._result.copy_(self._exchange.result.words, non_blocking=True)
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


class DeviceMessagesCodec(CudaCodec):
    """Packs into messages on the device itself and unpacks from them: there is nothing to copy but counts.

    The worker thread calls CUDA on a stream of its own, beside those of the backward pass.
    """

    @contextmanager
    def on_worker(self) -> Iterator[None]:
        with (
            self.on_device(),
            torch.cuda.stream(self._streams.exchanging),
        ):
            yield

    def _new_words(self, bucket: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._exchange.sent.words, self._exchange.result.words

    def _send(self) -> None:
        pass

    def _make_ready(self) -> None:
        self._result.record_stream(self._streams.returning)  # the allocator knows of the stream that made the plan
