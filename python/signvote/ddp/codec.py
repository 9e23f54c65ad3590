"""How a bucket becomes the message that a rank sends, and the voted message the bucket: on the CPU, on a CUDA device.

A message lies in host memory, where gloo and the vote want it, whatever device the gradients are on. So the exchange
knows nothing of devices, and ranks of both kinds vote with each other.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from signvote import cuda_runs
from signvote.ddp.stats import Counters
from signvote.ddp.topology import Exchange
from signvote.runs import Coefficients, Runs, pack_runs, unpack_runs


class DeviceError(RuntimeError):
    """A CUDA device failed; the message starts with the phase and the device."""


class Codec(Protocol):
    """Packs one bucket into ``exchange.sent`` and unpacks ``exchange.result`` into it. It counts the time of both.

    Attributes:
        num_threads_of_worker: How many threads of the CPU the vote that :meth:`pack` began may use.
    """

    num_threads_of_worker: int

    def on_device(self) -> AbstractContextManager[object]:
        """Where a thread calls CUDA: with another device current, CUDA would make itself at home there too."""

    def pack(
        self,
        bucket: torch.Tensor,
        momentum: torch.Tensor | None,
        coefficients: Coefficients,
        *,
        zeros: str,
        seed: int,
        is_last: bool,
    ) -> None:
        """Begin to pack, on the thread that computes and after what it has begun; ``is_last`` bucket of its pass."""

    def packed(self) -> tuple[int, int]:
        """Wait for the words; return how many coordinates were undecided (±0), and how many not finite."""

    def unpack(self, bucket: torch.Tensor, *, scale: float) -> None:
        """Begin to unpack."""

    def fill(self, bucket: torch.Tensor, value: float) -> None:
        """Begin to fill the bucket instead."""

    def new_future(self) -> "torch.futures.Future[Any]":
        """One whose callbacks call :meth:`hand_over` and return the bucket."""

    def hand_over(self) -> None:
        """What the caller begins on the device from here on comes after all that was begun with the bucket."""


@dataclass(frozen=True)
class Streams:
    """Of one CUDA device, those on which words leave it and come back, beside the backward pass."""

    leaving: torch.cuda.Stream
    returning: torch.cuda.Stream

    @classmethod
    def of(cls, device: torch.device) -> "Streams":
        return cls(torch.cuda.Stream(device), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def new_codec(
    bucket: torch.Tensor,
    runs: Runs,
    exchange: Exchange,
    counters: Counters,
    *,
    streams: Streams | None,
    implementation: str | None,
) -> Codec:
    """The codec of ``bucket``; ``streams`` are those of its device if that is a CUDA device."""
    if streams is None:
        return CpuCodec(runs, exchange, counters, implementation)
    return CudaCodec(bucket, runs, exchange, counters, streams)


class CpuCodec:
    """What is begun is done when a call returns."""

    def __init__(self, runs: Runs, exchange: Exchange, counters: Counters, implementation: str | None) -> None:
        self._runs, self._exchange, self._counters = runs, exchange, counters
        self._implementation = implementation
        self._counts = (0, 0)
        self.num_threads_of_worker = 1

    def on_device(self) -> AbstractContextManager[object]:
        return nullcontext()

    def pack(
        self,
        bucket: torch.Tensor,
        momentum: torch.Tensor | None,
        coefficients: Coefficients,
        *,
        zeros: str,
        seed: int,
        is_last: bool,
    ) -> None:
        num_threads = torch.get_num_threads()  # of the thread that computes: torch has a setting for each
        # Beside the backward pass the worker thread takes no other CPU from it; after the last bucket it is over.
        self.num_threads_of_worker = num_threads if is_last else 1
        start = time.perf_counter()
        self._counts = pack_runs(
            bucket,
            momentum,
            coefficients,
            self._runs,
            self._exchange.sent.view(-1),
            zeros=zeros,
            seed=seed,
            implementation=self._implementation,
            num_threads=num_threads,
        )
        self._counters.pack_seconds += time.perf_counter() - start

    def packed(self) -> tuple[int, int]:
        return self._counts

    def unpack(self, bucket: torch.Tensor, *, scale: float) -> None:
        start = time.perf_counter()
        unpack_runs(
            self._exchange.result.view(-1),
            self._runs,
            bucket,
            scale=scale,
            implementation=self._implementation,
            num_threads=self.num_threads_of_worker,
        )
        self._counters.unpack_seconds += time.perf_counter() - start

    def fill(self, bucket: torch.Tensor, value: float) -> None:
        bucket.fill_(value)

    def new_future(self) -> "torch.futures.Future[Any]":
        return torch.futures.Future()

    def hand_over(self) -> None:
        pass


class CudaCodec:
    """Packs on the stream that is current; copies words to pinned memory on a second stream, and back on a third.

    Only :meth:`packed` waits for the device, on the worker thread. When it returns, the device has read the bucket, and
    nothing that was begun with what :meth:`pack` was given is left to do. What :meth:`unpack` and :meth:`fill` begin is
    waited for on the device alone: by the stream that is current in :meth:`hand_over`, and before the next message
    takes the place of the last.

    The worker thread is in :meth:`on_device` when it calls any of these.
    """

    def __init__(
        self, bucket: torch.Tensor, runs: Runs, exchange: Exchange, counters: Counters, streams: Streams
    ) -> None:
        self._exchange, self._counters, self._streams = exchange, counters, streams
        self._device = bucket.device
        self.num_threads_of_worker = 1
        with self.on_device():
            exchange.sent = exchange.sent.pin_memory()
            exchange.result = exchange.result.pin_memory()
            self._counts_here = torch.zeros(2, dtype=torch.int64, device="cpu").pin_memory()
            self._runs = cuda_runs.DeviceRuns.of(runs, bucket.numel(), exchange.sent.numel(), bucket.device)
            self._sent = bucket.new_zeros(exchange.sent.shape, dtype=torch.int32)
            self._counts = bucket.new_zeros(2, dtype=torch.int64)
            with torch.cuda.stream(streams.returning):  # the caching allocator keeps its memory for that stream
                self._result = bucket.new_empty(exchange.result.shape, dtype=torch.int32)
            self._pack_began, self._pack_ended, self._sent_ready, self._unpack_began, self._unpack_ended = (
                torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
                for _ in range(5)
            )
        self._is_unpacking = False

    def on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device)

    def pack(
        self,
        bucket: torch.Tensor,
        momentum: torch.Tensor | None,
        coefficients: Coefficients,
        *,
        zeros: str,
        seed: int,
        is_last: bool,
    ) -> None:
        self.num_threads_of_worker = torch.get_num_threads()  # a backward pass on the device leaves the CPU free
        with self._phase("packing"), self.on_device():
            stream, leaving = torch.cuda.current_stream(), self._streams.leaving
            self._pack_began.record(stream)
            cuda_runs.pack_runs(
                bucket, momentum, coefficients, self._runs, self._sent.view(-1), self._counts, zeros=zeros, seed=seed
            )
            self._pack_ended.record(stream)
            leaving.wait_event(self._pack_ended)
            leaving.wait_event(self._unpack_ended)  # of the last message: the device has read exchange.result
            with torch.cuda.stream(leaving):
                self._exchange.sent.copy_(self._sent, non_blocking=True)
                self._counts_here.copy_(self._counts, non_blocking=True)
                self._sent_ready.record(leaving)

    def packed(self) -> tuple[int, int]:
        with self._phase("packing"):
            self._sent_ready.synchronize()
            self._counters.pack_seconds += 1e-3 * self._pack_began.elapsed_time(self._sent_ready)
            if self._is_unpacking:
                self._counters.unpack_seconds += 1e-3 * self._unpack_began.elapsed_time(self._unpack_ended)
                self._is_unpacking = False
        zeros, nonfinite = self._counts_here.tolist()
        return zeros, nonfinite

    def unpack(self, bucket: torch.Tensor, *, scale: float) -> None:
        with self._unpacking(bucket):
            self._result.copy_(self._exchange.result, non_blocking=True)
            cuda_runs.unpack_runs(self._result.view(-1), self._runs, bucket, scale=scale)

    def fill(self, bucket: torch.Tensor, value: float) -> None:
        with self._unpacking(bucket):
            bucket.fill_(value)

    @contextmanager
    def _unpacking(self, bucket: torch.Tensor) -> Iterator[None]:
        returning = self._streams.returning
        with self._phase("unpacking"), torch.cuda.stream(returning):
            self._unpack_began.record(returning)
            try:
                yield
            finally:  # whatever was begun before an error
                self._unpack_ended.record(returning)
                bucket.record_stream(returning)  # DDP may free it before this is done, and it is another stream's
                self._is_unpacking = True

    def new_future(self) -> "torch.futures.Future[Any]":
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
