"""Streams, events, futures and the caching allocator of a CUDA device: what is not ordered goes wrong.

What is queued on a stream is done as late as it may be: when the host waits for it, or for something after it. Memory
that is freed is overwritten as early as it may be: when the stream it was allocated on, and those it was recorded on,
have done what was queued on them; where only that one stream has used it, in the order of the stream. So a wait, an
event or a ``record_stream`` that is missing shows in the results, or as a write to memory that is no longer the
writer's, which :meth:`Device.finish` finds. A call for which CUDA would use the current device fails in a thread that
has not made ``cuda:1`` its own: threads begin with ``cuda:0``.

"Device memory" is ordinary memory, held by tensors that say they are on ``cuda:1``; kernels are the CPU's ops, and
random numbers those of the CPU's generator. Any function of torch may be called with such tensors: a call on ``meta``
tensors says whether the result is a view, which is made at once, or new memory, which is written in the order of the
current stream. A function that needs the data makes the host wait.

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

import torch
from torch._C import DisableTorchFunctionSubclass
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

CUDA = torch.device("cuda", 1)
GARBAGE = 0xA5

# What goes wrong, as errors say it.
FREED_MEMORY = "memory was written to after it was freed"
USED_AFTER_FREE = "memory was used after it was freed"
WRONG_DEVICE = "another device is current"
NO_TIME = "an event has no time"


class Device:
    """The one device, while :func:`simulated_ops.simulated` lasts."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        self.local = threading.local()
        self.streams: list[Stream] = []
        self.freed: list[torch.Tensor] = []
        self.collectives: list[tuple[Stream, int]] = []  # and the task that each of them is
        self.allocations = 0  # of the device's memory
        self.pinned = 0
        # For what is queued, copies that block, and numbers that Python reads.
        self.waits_of_workers = self.waits = 0
        self.tasks_in_the_way = 0  # of a worker thread, on the default stream
        self.checks_times = True
        self.is_used_after_free = False

    def current(self) -> Stream:
        """Of this thread; a thread that has chosen none has one of its own, where CUDA has one for all of them."""
        if not hasattr(self.local, "stream"):
            self.local.stream = Stream(is_default=True)
        stream: Stream = self.local.stream
        return stream

    @property
    def index(self) -> int:
        """Of the device that is current in this thread."""
        return getattr(self.local, "index", 0)

    def check_current(self) -> None:
        assert self.index == CUDA.index, WRONG_DEVICE

    def finish(self) -> None:
        """Do all that is queued, and check that freed memory was not used and is as it was left."""
        for stream in self.streams:
            stream.run(len(stream.tasks))
        for memory in self.freed:
            assert (memory == GARBAGE).all(), FREED_MEMORY
        assert not self.is_used_after_free, USED_AFTER_FREE


DEVICE = Device()


def is_worker() -> bool:
    """Whether this thread is that of a state."""
    return threading.current_thread().name.startswith("signvote")


class Stream:
    def __init__(self, device: Any = None, *, is_default: bool = False) -> None:
        self.tasks: list[Callable[[], object]] = []
        self.done = 0
        self.is_default = is_default
        with DEVICE.lock:
            DEVICE.streams.append(self)

    def queue(self, task: Callable[[], object], *tensors: Any) -> None:
        """That uses ``tensors``, as far as they are on the device."""
        if tensors and self.is_default and is_worker():
            DEVICE.tasks_in_the_way += 1
        memories = [tensor.memory for tensor in tensors if isinstance(tensor, Tensor)]
        are_freed = [memory.is_freed for memory in memories]  # the task keeps no memory from being freed

        def checked() -> None:
            if any(is_freed[0] for is_freed in are_freed):
                DEVICE.is_used_after_free = True  # what is raised while memory is freed, nobody catches
            task()

        with DEVICE.lock:
            self.tasks.append(checked)
            for memory in memories:
                if memory.streams[0] is not self:
                    memory.is_shared[0] = True

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

    def query(self) -> bool:
        """Whoever asks asks until it is so."""
        self.synchronize()
        return True

    def synchronize(self) -> None:
        DEVICE.check_current()
        if not is_worker():
            DEVICE.waits += 1  # only the worker of a state may: beside it the backward pass goes on
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

    def __init__(self, memory: torch.Tensor) -> None:
        self.streams = [DEVICE.current()]
        self.is_shared = [False]  # by streams
        self.is_freed = [False]
        weakref.finalize(self, free, bytes_of(memory), self.streams, self.is_shared, self.is_freed, DEVICE.freed)


def bytes_of(memory: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory.untyped_storage())


def free(
    memory: torch.Tensor,
    streams: list[Stream],
    is_shared: list[bool],
    is_freed: list[bool],
    freed_memory: list[torch.Tensor],
) -> None:
    """What is left of an earlier job, collected late, goes to that job's ``freed_memory``."""

    def overwrite() -> None:
        memory.fill_(GARBAGE)
        is_freed[0] = True
        freed_memory.append(memory)

    with DEVICE.lock:
        if len(streams) == 1 and not is_shared[0]:
            streams[0].queue(overwrite)
            return
        for stream in streams:
            stream.run(len(stream.tasks))
        overwrite()


class Tensor(torch.Tensor):
    """One on the device."""

    memory: Memory

    def record_stream(self, stream: Any) -> None:
        self.memory.streams.append(stream)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CONSTANTS:
            return CONSTANTS[func]
        with DisableTorchFunctionSubclass():
            if func is torch.Tensor.copy_ and not all(isinstance(x, Tensor) for x in args[:2]):
                return copy_from_or_to_the_host(*args, **(kwargs or {}))
            return call(func, args, kwargs or {})


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


def new_memory(like: torch.Tensor) -> Any:
    """With whatever was there before."""
    DEVICE.allocations += 1
    memory = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")
    bytes_of(memory).fill_(GARBAGE)
    return allocate(memory)


def wait_for_current_stream() -> None:
    if is_worker():
        DEVICE.waits_of_workers += 1
    else:
        DEVICE.waits += 1
    DEVICE.current().run(len(DEVICE.current().tasks))


def call(func: Any, args: Any, kwargs: Any) -> Any:
    """What ``func`` does and returns on the device."""
    ours: list[tuple[torch.Tensor, Any]] = []  # tensors without data, and those for which they stand

    def without_data(x: Any) -> Any:
        if isinstance(x, Tensor):
            like = raw(x)
            memory = torch.empty(like.untyped_storage().nbytes() // like.itemsize, dtype=like.dtype, device="meta")
            ours.append((memory.as_strided(like.shape, like.stride(), like.storage_offset()), x))
            return ours[-1][0]
        assert not isinstance(x, torch.Tensor) or x.dim() == 0, f"{func} on tensors of the device and of the host"
        return x

    raw_args, raw_kwargs = tree_map(lambda x: raw(x) if isinstance(x, Tensor) else x, (args, kwargs))
    shape_args, shape_kwargs = tree_map(without_data, (args, kwargs))
    shape_kwargs.pop("generator", None)
    try:
        shapes, structure = tree_flatten(func(*shape_args, **shape_kwargs))
    except RuntimeError as error:
        if not isinstance(error, NotImplementedError) and "cannot be called on meta tensors" not in str(error):
            raise
        wait_for_current_stream()
        return tree_map_only(torch.Tensor, torch.Tensor.clone, func(*raw_args, **raw_kwargs))

    is_fact = func.__name__ == "__get__" or not any(x is None or isinstance(x, torch.Tensor) for x in shapes)
    viewed = [x for one, x in ours if any(shares_memory(one, shape) for shape in shapes)]
    if is_fact or viewed:
        result = func(*raw_args, **raw_kwargs)
        return tree_map_only(torch.Tensor, lambda x: wrap(x, viewed[0].memory), result)

    def result_of(shape: Any) -> Any:
        if not isinstance(shape, torch.Tensor):
            return shape
        written = [x for one, x in ours if one is shape]
        return written[0] if written else new_memory(shape)

    results = [result_of(shape) for shape in shapes]
    raw_results = [raw(x) if isinstance(x, Tensor) else x for x in results]  # a kernel keeps no memory from being freed

    def kernel() -> None:
        for result, found in zip(raw_results, tree_leaves(func(*raw_args, **raw_kwargs)), strict=True):
            if isinstance(result, torch.Tensor):
                result.copy_(found)

    if not func.__name__.startswith("new_empty") and not func.__name__.startswith("empty"):
        DEVICE.current().queue(kernel, *results, *(x for _, x in ours))
    return tree_unflatten(results, structure)


def shares_memory(x: torch.Tensor, view: Any) -> bool:
    """Whether ``view`` is another tensor in the memory of ``x``."""
    if not isinstance(view, torch.Tensor) or view is x:
        return False
    return bool(view.untyped_storage()._cdata == x.untyped_storage()._cdata)


def copy_from_or_to_the_host(target: Any, source: Any, non_blocking: bool = False) -> Any:
    """Waited for, unless told not to and the host's memory is pinned."""
    raw_target, raw_source = raw(target), raw(source)
    DEVICE.current().queue(lambda: raw_target.copy_(raw_source), target, source)
    host = source if isinstance(target, Tensor) else target
    if not (non_blocking and hasattr(host, "is_in_pinned_memory")):
        wait_for_current_stream()
    return target


def pin_memory(x: torch.Tensor) -> torch.Tensor:
    DEVICE.check_current()  # the memory is pinned for that one
    DEVICE.pinned += 1
    pinned = x.clone()
    pinned.is_in_pinned_memory = True  # type: ignore[attr-defined]
    return pinned
