"""Streams, events, futures and the caching allocator of a CUDA device: what is not ordered goes wrong.

What is queued on a stream is done as late as it may be: when the host waits for it, or for something after it. Memory
that is freed is overwritten as early as it may be: when the stream it was allocated on, and those it was recorded on,
have done what was queued on them. So a wait, an event or a ``record_stream`` that is missing shows in the results, or
as a write to memory that is no longer the writer's, which :meth:`Device.finish` finds. A call for which CUDA would use
the current device fails in a thread that has not made ``cuda:1`` its own: threads begin with ``cuda:0``.

"Device memory" is ordinary memory, held by tensors that say they are on ``cuda:1``; kernels are the CPU's ops.

Not covered: the kernels and how they are launched (``cuda.launch``, ``cuda_runs`` and its ``DeviceRuns`` are replaced,
and with them the tables of pieces and their ``record_stream``), work that is done early or half, the allocator of
pinned memory, and several devices.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._C import DisableTorchFunctionSubclass

from signvote import cuda, cuda_runs, runs

CUDA = torch.device("cuda", 1)
GARBAGE = 0xA5

# What goes wrong, as errors say it.
FREED_MEMORY = "memory was written to after it was freed"
WRONG_DEVICE = "another device is current"
NO_TIME = "an event has no time"
WAITS = "the thread that computes waits for the device"


class Device:
    """The one device, while :func:`simulated` lasts."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        self.local = threading.local()
        self.streams: list[Stream] = []
        self.freed: list[torch.Tensor] = []
        self.allocations = 0
        self.waiting_copies = 0
        self.checks_times = True

    def current(self) -> Stream:
        """Of this thread; a thread that has chosen none has one of its own, where CUDA has one for all of them."""
        if not hasattr(self.local, "stream"):
            self.local.stream = Stream()
        stream: Stream = self.local.stream
        return stream

    @property
    def index(self) -> int:
        """Of the device that is current in this thread."""
        return getattr(self.local, "index", 0)

    def check_current(self) -> None:
        assert self.index == CUDA.index, WRONG_DEVICE

    def finish(self) -> None:
        """Do all that is queued, and check that freed memory is as it was left."""
        for stream in self.streams:
            stream.run(len(stream.tasks))
        for memory in self.freed:
            assert (memory == GARBAGE).all(), FREED_MEMORY


DEVICE = Device()


def waits() -> None:
    """Where the host waits for the device. Only the worker of a state may: beside it the backward pass goes on."""
    assert threading.current_thread().name.startswith("signvote"), WAITS


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.tasks: list[Callable[[], object]] = []
        self.done = 0
        with DEVICE.lock:
            DEVICE.streams.append(self)

    def queue(self, task: Callable[[], object]) -> None:
        with DEVICE.lock:
            self.tasks.append(task)

    def run(self, end: int) -> None:
        with DEVICE.lock:
            while self.done < end:
                task = self.tasks[self.done]
                self.done += 1
                task()

    def wait_event(self, event: Event) -> None:
        DEVICE.check_current()
        self.wait(event)

    def wait(self, event: Event) -> None:
        if event.place is not None:
            stream, end = event.place
            self.queue(lambda: stream.run(end))


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.place: tuple[Stream, int] | None = None
        self.enable_timing = enable_timing

    def record(self, stream: Stream) -> None:
        DEVICE.check_current()
        self.mark(stream)

    def mark(self, stream: Stream) -> None:
        with DEVICE.lock:
            self.place = stream, len(stream.tasks)

    def synchronize(self) -> None:
        DEVICE.check_current()
        waits()
        if self.place is not None:
            self.place[0].run(self.place[1])

    def elapsed_time(self, end: Event) -> float:
        DEVICE.check_current()
        if DEVICE.checks_times:
            assert all(event.enable_timing and event.is_done() for event in (self, end)), NO_TIME
        return 1.0

    def is_done(self) -> bool:
        return self.place is not None and self.place[0].done >= self.place[1]


@contextmanager
def stream_context(stream: Stream) -> Iterator[None]:
    before = DEVICE.current()
    DEVICE.local.stream = stream
    try:
        yield
    finally:
        DEVICE.local.stream = before


@contextmanager
def checked_stream_context(stream: Stream) -> Iterator[None]:
    """As ``torch.cuda.stream``, which asks the current device for its stream."""
    DEVICE.check_current()
    with stream_context(stream):
        yield
    DEVICE.check_current()


def current_stream(device: torch.device | None = None) -> Stream:
    if device is None:
        DEVICE.check_current()
    return DEVICE.current()


@contextmanager
def device_context(device: torch.device | int) -> Iterator[None]:
    before = DEVICE.index
    DEVICE.local.index = device if isinstance(device, int) else device.index
    try:
        yield
    finally:
        DEVICE.local.index = before


class Future:
    """As ``torch.futures.Future``: of values on devices that it was not told of it knows no events."""

    def __init__(self, *, devices: list[torch.device] | None = None) -> None:
        self.devices = devices or []
        self.is_done = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None
        self.event = Event()
        self.device_index = 0
        self.callbacks: list[Callable[[], None]] = []
        self.lock = threading.RLock()

    def set_result(self, value: Any) -> None:
        self.result = value
        if self.devices and isinstance(value, Tensor):
            DEVICE.check_current()
            self.event.mark(DEVICE.current())
        self._complete()

    def set_exception(self, error: Exception) -> None:
        self.error = error
        self._complete()

    def done(self) -> bool:
        return self.is_done.is_set()

    def _complete(self) -> None:
        with self.lock:
            self.device_index = DEVICE.index
            self.is_done.set()
            callbacks = self.callbacks
        for callback in callbacks:
            callback()

    def then(self, callback: Callable[[Future], Any]) -> Future:
        child = Future(devices=self.devices)

        def call() -> None:
            own = Stream()
            own.wait(self.event)
            with device_context(self.device_index), stream_context(own) if self.devices else ExitStack():
                try:
                    result = callback(self)
                except Exception as error:
                    child.set_exception(error)
                else:
                    child.set_result(result)

        with self.lock:
            is_done = self.is_done.is_set()
            if not is_done:
                self.callbacks.append(call)
        if is_done:
            call()
        return child

    def value(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result

    def wait(self) -> Any:
        assert self.is_done.wait(30), "no result within 30 s"
        if self.error is None and self.devices and isinstance(self.result, Tensor):
            DEVICE.current().wait(self.event)
            self.result.memory.streams.append(DEVICE.current())
        return self.value()


class Memory:
    """What the caching allocator gave out: it comes back when no tensor refers to it any more."""

    def __init__(self, raw: torch.Tensor) -> None:
        self.streams = [DEVICE.current()]
        weakref.finalize(self, free, raw.reshape(-1).view(torch.uint8), self.streams)


def free(memory: torch.Tensor, streams: list[Stream]) -> None:
    with DEVICE.lock:
        for stream in streams:
            stream.run(len(stream.tasks))
        memory.fill_(GARBAGE)
        DEVICE.freed.append(memory)


class Tensor(torch.Tensor):
    """One on the device."""

    memory: Memory

    def record_stream(self, stream: Any) -> None:
        self.memory.streams.append(stream)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0]
        if func in CONSTANTS:
            return CONSTANTS[func]
        name = func.__name__
        with DisableTorchFunctionSubclass():
            if name in ("new_zeros", "new_empty"):
                return new_memory(args[1], kwargs["dtype"], is_zeroed=name == "new_zeros")
            if name in ("copy_", "fill_"):
                return begin(func, args, **kwargs)
            if name == "to":
                assert args[1] == "cpu"
                DEVICE.waiting_copies += 1
                DEVICE.current().run(len(DEVICE.current().tasks))
                return raw(x).clone()
            if name in VIEWS or func in FACTS:
                result = func(raw(x), *args[1:], **kwargs)
                return wrap(result, x.memory) if name in VIEWS else result
        raise NotImplementedError(f"{func} on simulated memory")


VIEWS = {"view", "as_strided", "split", "__getitem__"}
FACTS = {
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.layout.__get__,  # type: ignore[attr-defined]
    torch.Tensor.numel,
    torch.Tensor.storage_offset,
    torch.Tensor.size,
}
CONSTANTS: dict[Any, Any] = {
    torch.Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__: CUDA,
}


def raw(x: torch.Tensor) -> torch.Tensor:
    """The same memory, without its owner."""
    with DisableTorchFunctionSubclass():
        return x.as_subclass(torch.Tensor)


def wrap(x: Any, memory: Memory) -> Any:
    if isinstance(x, (list, tuple)):
        return tuple(wrap(one, memory) for one in x)
    wrapped = x.as_subclass(Tensor)
    wrapped.memory = memory
    return wrapped


def allocate(memory: torch.Tensor) -> Any:
    """``memory`` as a tensor on the device, allocated on the current stream."""
    with DisableTorchFunctionSubclass():
        return wrap(memory, Memory(memory))


def new_memory(shape: Any, dtype: torch.dtype, *, is_zeroed: bool) -> Any:
    """With whatever was there before; zeros come later, as a kernel on the current stream."""
    DEVICE.allocations += 1
    memory = torch.empty(shape, dtype=dtype, device="cpu")
    memory.view(-1).view(torch.uint8).fill_(GARBAGE)
    if is_zeroed:
        DEVICE.current().queue(memory.zero_)
    return allocate(memory)


def begin(func: Any, args: Any, non_blocking: bool = False) -> Any:
    """Queue a copy or a fill on the current stream; one of host memory is waited for, unless told not to and pinned."""
    raws = [raw(x) if isinstance(x, torch.Tensor) else x for x in args]
    DEVICE.current().queue(lambda: func(*raws))
    host = [x for x in args if isinstance(x, torch.Tensor) and not isinstance(x, Tensor)]
    if host and not (non_blocking and all(hasattr(x, "is_in_pinned_memory") for x in host)):
        DEVICE.waiting_copies += 1
        DEVICE.current().run(len(DEVICE.current().tasks))
    return args[0]


def pin_memory(x: torch.Tensor) -> torch.Tensor:
    DEVICE.check_current()  # the memory is pinned for that one
    pinned = x.clone()
    pinned.is_in_pinned_memory = True  # type: ignore[attr-defined]
    return pinned


def pack_runs(
    bucket: Any, momentum: Any, coefficients: Any, pieces: Any, out: Any, counts: Any, *, zeros: str, seed: int
) -> None:
    source, kept, words, found = (None if x is None else raw(x) for x in (bucket, momentum, out, counts))

    def kernel() -> None:
        assert source is not None
        assert words is not None
        assert found is not None
        counted = runs.pack_runs(source, kept, coefficients, pieces, words, zeros=zeros, seed=seed)
        found[:] = torch.tensor(counted, device="cpu")

    DEVICE.current().queue(kernel)


def unpack_runs(words: Any, pieces: Any, bucket: Any, *, scale: float) -> None:
    source, target = raw(words), raw(bucket)
    DEVICE.current().queue(lambda: runs.unpack_runs(source, pieces, target, scale=scale))


def pack_ternary_runs(bucket: Any, pieces: Any, out: Any, counts: Any, *, stride: int, threshold: float) -> None:
    source, words, found = map(raw, (bucket, out, counts))

    def kernel() -> None:
        counted = runs.pack_ternary_runs(source, pieces, words, stride=stride, threshold=threshold)
        found[:] = torch.tensor(counted, device="cpu")

    DEVICE.current().queue(kernel)


def unpack_ternary_runs(words: Any, pieces: Any, stride: int, bucket: Any, *, scale: float) -> None:
    source, target = raw(words), raw(bucket)
    DEVICE.current().queue(lambda: runs.unpack_ternary_runs(source, pieces, stride, target, scale=scale))


class DeviceRuns:
    @staticmethod
    def of(table: Any, num_coordinates: int, num_words: int, device: torch.device) -> Any:
        return table


PATCHES: dict[Any, dict[str, Any]] = {
    torch.cuda: {
        "Stream": Stream,
        "Event": Event,
        "current_stream": current_stream,
        "stream": checked_stream_context,
        "device": device_context,
        "is_current_stream_capturing": lambda: False,
    },
    torch.futures: {"Future": Future},
    torch.Tensor: {"pin_memory": pin_memory},
    cuda: {"module_for": lambda op, name, device: None},
    cuda_runs: {
        "pack_runs": pack_runs,
        "unpack_runs": unpack_runs,
        "pack_ternary_runs": pack_ternary_runs,
        "unpack_ternary_runs": unpack_ternary_runs,
        "DeviceRuns": DeviceRuns,
    },
}


@contextmanager
def simulated() -> Iterator[Device]:
    """torch and signvote find the simulated device in place of CUDA."""
    DEVICE.clear()
    with ExitStack() as stack:
        for target, names in PATCHES.items():
            stack.enter_context(mock.patch.multiple(target, **names))
        yield DEVICE
