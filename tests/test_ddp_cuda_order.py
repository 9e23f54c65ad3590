"""What the hook begins on a CUDA device is ordered: shown without a GPU, on the device that simulated_cuda describes.

The whole hook runs, on real gloo ranks, with kernels of the CPU that are done as late as streams and events allow. Then
each line that orders them is left out, one after the other, and each time something must go wrong.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import simulated_cuda
from ddp_simulation import Simulation
from ranks import RankPool
from signvote import cuda
from signvote.ddp import MajorityVoteState, codec, hook, majority_vote_hook, momentum
from simulated_cuda import DEVICE, Stream, allocate, raw, simulated, stream_context

NUMELS = {"a": 70, "b": 1000, "c": 33}
# DDP shows other buckets from the second step on.
FIRST_BUCKETS, BUCKETS = [["c", "b"], ["a"]], [["b"], ["c", "a"]]
STEPS = 7
SAVED_AT = 3  # and loaded into another state
POISONED = (0, 5, "a")  # which makes its bucket, {"a", "c"}, NaN on all ranks

# What orders work on the device, or keeps its memory: (where it is found, its name).
ORDERING = [
    (simulated_cuda.Stream, "wait_event"),
    (simulated_cuda.Event, "record"),
    (simulated_cuda.Event, "synchronize"),
    (torch.cuda, "stream"),
    (simulated_cuda.Tensor, "record_stream"),
    (torch.Tensor, "pin_memory"),
    (torch.futures, "Future"),
]
SOURCES = {str(module.__file__): Path(str(module.__file__)).name for module in (codec, hook, momentum)}


class Bucket:
    """As DDP's GradBucket."""

    def __init__(self, index: int, parameters: list[nn.Parameter], buffer: Any, is_last: bool) -> None:
        self._all = index, parameters, buffer, is_last

    def index(self) -> int:
        return self._all[0]

    def parameters(self) -> list[nn.Parameter]:
        return self._all[1]

    def buffer(self) -> Any:
        return self._all[2]

    def is_last(self) -> bool:
        return self._all[3]


def call_hook(state: MajorityVoteState, bucket: Bucket) -> Any:
    return majority_vote_hook(state, bucket)


@contextmanager
def buckets_of_ours() -> Iterator[None]:
    with mock.patch.object(dist, "GradBucket", Bucket):
        yield


def gradients(rank: int, step: int, name: str) -> torch.Tensor:
    x = torch.randn(NUMELS[name], generator=torch.Generator().manual_seed(100 * step + 10 * rank + ord(name)))
    if (rank, step, name) == POISONED:
        x[3] = torch.inf
    return x


def train() -> tuple[list[dict[str, torch.Tensor]], int]:
    """The votes of each step, and how often the hook allocated or waited for a copy in the steps but the first.

    The backward pass of each step runs on another stream, whoever needs the votes is on a third one, and none of them
    waits for anything but the future.
    """
    rank = dist.get_rank()
    parameters = {name: nn.Parameter(torch.zeros(numel)) for name, numel in NUMELS.items()}
    state = new_state(parameters)
    backward, reader, elsewhere = (Stream(), Stream()), Stream(), Stream()
    votes: list[dict[str, torch.Tensor]] = [{} for _ in range(STEPS)]
    kept = []
    costs = 0
    for step in range(STEPS):
        futures = []
        if step == SAVED_AT:
            saved = state.state_dict()
            state = new_state(parameters)
            state.load_state_dict(saved)
        with stream_context(backward[step % 2]):
            buckets = BUCKETS if step else FIRST_BUCKETS
            for index, names in enumerate(buckets):
                gradient = torch.cat([gradients(rank, step, name) for name in names])
                with stream_context(elsewhere):
                    buffer = allocate(torch.zeros_like(gradient))
                memory = raw(buffer)
                backward[step % 2].queue(partial(memory.copy_, gradient))
                before = DEVICE.allocations + DEVICE.waiting_copies
                bucket = Bucket(index, [parameters[name] for name in names], buffer, index + 1 == len(buckets))
                futures.append((call_hook(state, bucket), names, memory))
                if step not in (0, 1, SAVED_AT):
                    costs += DEVICE.allocations + DEVICE.waiting_copies - before
                kept.append(buffer)
        with stream_context(reader):
            for future, names, memory in futures:
                future.wait()
                reader.queue(partial(read, memory, names, votes[step]))
        if step % 2:
            reader.run(len(reader.tasks))
        if step == 2:
            # Not always: what is freed has its streams do what was begun.
            kept.clear()
    finish(state, parameters, elsewhere)
    return votes, costs


def new_state(parameters: dict[str, nn.Parameter]) -> MajorityVoteState:
    state = MajorityVoteState()
    state.name_parameters(parameters.items())
    return state


def read(memory: torch.Tensor, names: list[str], votes: dict[str, torch.Tensor]) -> None:
    for name, piece in zip(names, torch.split(memory.clone(), [NUMELS[name] for name in names]), strict=True):
        votes[name] = piece


def finish(state: MajorityVoteState, parameters: dict[str, nn.Parameter], elsewhere: Stream) -> None:
    """A last vote that nobody waits for, as when an earlier bucket has raised, and whose memory is freed."""
    with stream_context(elsewhere):
        buffer = allocate(torch.zeros(NUMELS["b"]))
    with stream_context(Stream()):
        future = call_hook(state, Bucket(0, [parameters["b"]], buffer, False))
    deadline = time.monotonic() + 30
    while not future.is_done.is_set() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert future.is_done.is_set()
    del buffer, future, state
    gc.collect()
    DEVICE.finish()


@contextmanager
def left_out(place: tuple[str, int] | None, seen: set[tuple[str, int, str]]) -> Iterator[None]:
    """Record which lines call what orders work, and do nothing in the call on line ``place``."""

    def patch(owner: Any, name: str) -> Any:
        right = getattr(owner, name)

        def called(*arguments: Any, **options: Any) -> Any:
            frame = sys._getframe(1)
            source = SOURCES.get(frame.f_code.co_filename)
            if source is None:
                return right(*arguments, **options)
            seen.add((source, frame.f_lineno, name))
            if (source, frame.f_lineno) != place:
                return right(*arguments, **options)
            if name == "stream":
                return stream_context(DEVICE.current())
            if name == "Future":
                return right()
            return arguments[0] if name == "pin_memory" else None

        return mock.patch.object(owner, name, called)

    patches = [patch(owner, name) for owner, name in ORDERING]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def train_on_the_simulated_device(place: tuple[str, int] | None = None) -> tuple[Any, set[tuple[str, int, str]]]:
    seen: set[tuple[str, int, str]] = set()
    with simulated(), buckets_of_ours(), left_out(place, seen):
        return train(), seen


def goes_wrong(outcomes: list[Any]) -> str | None:
    """What is wrong with the votes of all ranks, or with what they cost, if anything."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            return str(outcome).strip().splitlines()[-1]
    simulation = Simulation(len(outcomes), list(NUMELS))
    for step in range(STEPS):
        local = [{name: gradients(rank, step, name) for name in NUMELS} for rank in range(len(outcomes))]
        expected = simulation.vote(local)
        if step == POISONED[1]:
            expected.update({name: torch.full_like(expected[name], torch.nan) for name in ("a", "c")})
        for (votes, costs), _ in outcomes:
            if costs != 0:
                return f"{costs} allocations and copies that wait"
            for name in NUMELS:
                if name not in votes[step] or not votes[step][name].allclose(expected[name], 0, 0, equal_nan=True):
                    return f"the vote of step {step}"
    return None


def test_order(ranks: RankPool) -> None:
    assert goes_wrong(ranks.outcomes(train_on_the_simulated_device, world=2)) is None


def test_every_line_that_orders_is_needed(ranks: RankPool) -> None:
    (_, seen), _ = ranks.run(train_on_the_simulated_device, world=2)
    assert len(seen) >= 10
    needless = []
    for source, line, name in sorted(seen):
        problem = goes_wrong(ranks.outcomes(train_on_the_simulated_device, (source, line), world=2))
        print(f"{source}:{line} without {name}: {problem}")
        if problem is None:
            needless.append((source, line, name))
    assert needless == []


def fail_with_work_on_the_device(waits_also_after_a_failure: bool) -> None:
    """An exchange fails while the next bucket is packed on another stream than its momentum was made on."""
    parameters = [nn.Parameter(torch.zeros(100)) for _ in range(2)]
    address = hook._address

    def address_unless_failed(vote: Any) -> None:
        if vote.state.failure is None:
            address(vote)

    def buckets() -> list[Bucket]:
        return [Bucket(i, [parameters[i]], allocate(torch.zeros(100)), i == 1) for i in range(2)]

    patched = address if waits_also_after_a_failure else address_unless_failed
    with simulated(), buckets_of_ours(), mock.patch.object(hook, "_address", patched):
        state = MajorityVoteState()
        with stream_context(Stream()):
            for future in [call_hook(state, bucket) for bucket in buckets()]:
                future.wait()
        both_are_packed = threading.Event()

        def fail(*arguments: Any) -> None:
            both_are_packed.wait(30)
            raise RuntimeError("no route")

        with stream_context(Stream()), mock.patch.object(state.channel(), "swap", fail):
            futures = [call_hook(state, bucket) for bucket in buckets()]
            both_are_packed.set()
            for future in futures:
                with pytest.raises(RuntimeError, match="bucket 0: no route"):
                    future.wait()
        del state, future, futures
        gc.collect()
        DEVICE.finish()


def test_after_a_failure_nothing_is_left_to_do(ranks: RankPool) -> None:
    ranks.run(fail_with_work_on_the_device, True, world=2)
    for outcome in ranks.outcomes(fail_with_work_on_the_device, False, world=2):
        assert "memory was written to after it was freed" in str(outcome)


def use_two_devices() -> str:
    with simulated(), buckets_of_ours():
        state = MajorityVoteState()
        parameters = [nn.Parameter(torch.zeros(100)) for _ in range(2)]
        call_hook(state, Bucket(0, parameters[:1], allocate(torch.zeros(100)), False)).wait()
        with pytest.raises(ValueError, match="bucket 1") as info:
            call_hook(state, Bucket(1, parameters[1:], torch.zeros(100), True))
        return str(info.value)


def test_gradients_on_several_devices_are_refused(ranks: RankPool) -> None:
    assert ranks.run(use_two_devices, world=1) == [
        "majority_vote_hook: bucket 1: expected gradients on cuda:0, as before, got cpu: all gradients of a state are "
        "on one device; use one process for each device"
    ]


def test_first_cuda_bucket_needs_the_cuda_part(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(), buckets_of_ours():
        bucket = Bucket(0, [nn.Parameter(torch.zeros(100))], allocate(torch.zeros(100)), True)
    monkeypatch.setattr(cuda, "find_module", lambda: None)
    expected = "majority_vote_hook: bucket 0 is on device cuda:0, but signvote was built without its CUDA part: "
    with buckets_of_ours(), pytest.raises(RuntimeError, match=expected) as info:
        call_hook(MajorityVoteState(), bucket)
    assert cuda.BUILD_COMMAND in str(info.value)


def test_other_devices_are_refused() -> None:
    bucket = Bucket(3, [nn.Parameter(torch.zeros(8, device="meta"))], torch.zeros(8, device="meta"), True)
    with buckets_of_ours(), pytest.raises(ValueError, match="bucket 3: expected gradients on the CPU or on a CUDA dev"):
        call_hook(MajorityVoteState(), bucket)
