"""Small jobs of the hook on the simulated device, what of their order can be left out, and what must then go wrong.

The backward pass, who reads the votes, and the memory of the buckets are on streams of their own.
"""

from __future__ import annotations

import gc
import linecache
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import simulated_cuda
from ddp_simulation import Simulation
from signvote.ddp import CalibratedSwitch, MajorityVoteState, cuda_codec, hook, majority_vote_hook, momentum, topology
from simulated_cuda import DEVICE, Stream, allocate, raw, stream_context
from simulated_ops import simulated

NUMELS = {"a": 70, "b": 1000, "c": 33}
# DDP shows other buckets from the second step on.
FIRST_BUCKETS, BUCKETS = [["c", "b"], ["a"]], [["b"], ["c", "a"]]
STEPS = 7
SAVED_AT = 3  # and loaded into another state
POISONED = (0, 5, "a")  # which makes its bucket, {"a", "c"}, NaN on all ranks
STEADY = 5  # from which step on buckets and phases stay as they are


def fading(step: int) -> float:
    """Noise that ends with the step in which a gradient is not finite."""
    return 0.5 if step <= POISONED[1] + 1 else 0.0


# Those of the state; weights of the ranks; from which step on, the first of which is 1, the mean is taken, and whether
# a rule says so, if any step is.
OPTIONS: dict[str, dict[str, Any]] = {
    "constant_bits": {"momentum": 0.0, "zeros": "positive", "ties": "negative"},
    "abstain": {"abstain": True, "quorum": 2},
    "abstain_lion": {"momentum": (0.9, 0.99), "abstain": True, "warmup_steps": 4},
    "threshold": {"momentum": 0.0, "abstain": 0.5},
    "relative_threshold": {"momentum": (0.9, 0.99), "abstain": "rms:0.5", "quorum": 0.3},
    "zero_ties": {"ties": "zero", "scale": 0.5},
    "noise": {"dither": fading},
    "noise_and_threshold": {"momentum": 0.0, "abstain": "rms:0.5", "dither": 0.4},
    "dense_steps": {"momentum": (0.9, 0.99), "dense_steps": 2, "warmup_steps": 4},
    "dense_steps_only": {"dense_steps": STEPS + 1},
    "exclude": {"exclude": ["a"], "dense_steps": 2},
    "mean_abs": {"scale": "mean_abs", "track_agreement": True},
    "weights": {"weights": [1, 3], "abstain": True},
    "switch": {"switch": 5},
    "switch_by_a_rule": {"switch": 4, "has_rule": True},
    "rule": {"has_rule": True, "abstain": True},
    "everything": {
        "abstain": "rms:0.2",
        "quorum": 0.4,
        "warmup_steps": 3,
        "dense_steps": 1,
        "exclude": ["c"],
        "scale": "mean_abs",
        "dither": 0.1,
        "track_agreement": True,
        "weights": [2, 1],
        "switch": 5,
        "has_rule": True,
    },
}
# What orders work on the device, keeps its memory or makes it current: (where it is found, its name).
ORDERING = [
    (simulated_cuda.Stream, "wait_event"),
    (simulated_cuda.Event, "record"),
    (simulated_cuda.Event, "synchronize"),
    (torch.cuda, "stream"),
    (simulated_cuda.Tensor, "record_stream"),
    (torch.Tensor, "pin_memory"),
    (torch.futures, "Future"),
    (cuda_codec.CudaCodec, "on_device"),
]
SOURCES = {str(module.__file__): Path(str(module.__file__)).name for module in (cuda_codec, hook, momentum, topology)}

# What can go wrong, by what an error says. A message that is copied too early or too late shows in its trailer: it is
# then another one's, or has counts of garbage.
VOTES, MEMORY, COST, DEVICE_USED, TIMES, OTHER = "votes", "freed memory", "cost", "wrong device", "times", "other"
KINDS = {
    simulated_cuda.FREED_MEMORY: MEMORY,
    simulated_cuda.USED_AFTER_FREE: MEMORY,
    "ranks are out of step": VOTES,
    "out of bounds for int32": VOTES,
    simulated_cuda.WRONG_DEVICE: DEVICE_USED,
    simulated_cuda.NO_TIME: TIMES,
}


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


def wait_as_ddp(future: Any) -> None:
    value = future.wait()
    if not isinstance(value, torch.Tensor):
        raise RuntimeError(f"Unable to cast {value} to Tensor")


@contextmanager
def buckets_of_ours() -> Iterator[None]:
    with mock.patch.object(dist, "GradBucket", Bucket):
        yield


def gradients(rank: int, step: int, name: str) -> torch.Tensor:
    x = torch.randn(NUMELS[name], generator=torch.Generator().manual_seed(100 * step + 10 * rank + ord(name)))
    if (rank, step, name) == POISONED:
        x[3] = torch.inf
    return x


Votes = list[dict[str, torch.Tensor]]


class Outcome(NamedTuple):
    """The votes of each step, coordinates that were not finite, and what steps cost that begin nothing.

    ``allocations`` are of memory of the device; ``waits`` are those of the thread that computes, and memory that is
    pinned; ``waits_of_worker`` are for copies and numbers. ``tasks_in_the_way`` are those of a worker on the stream of
    the backward pass.
    """

    votes: Votes
    nonfinite: int
    allocations: int = 0
    waits: int = 0
    waits_of_worker: int = 0
    tasks_in_the_way: int = 0


def train(**options: Any) -> Outcome:
    """The backward pass of each step runs on another stream, whoever needs the votes is on a third one, and none of
    them waits for anything but the future.
    """
    rank = dist.get_rank()
    parameters = {name: nn.Parameter(torch.zeros(numel)) for name, numel in NUMELS.items()}
    state = new_state(parameters, **options)
    backward, reader, elsewhere = (Stream(), Stream()), Stream(), Stream()
    votes: Votes = [{} for _ in range(STEPS)]
    kept = []
    allocations = waits = waits_of_worker = 0
    for step in range(STEPS):
        futures = []
        if step == SAVED_AT:
            saved = state.state_dict()
            state = new_state(parameters, **options)
            state.load_state_dict(saved)
        if step == STEADY:
            allocations, waits = DEVICE.allocations, DEVICE.waits + DEVICE.pinned
            waits_of_worker = DEVICE.waits_of_workers
        with stream_context(backward[step % 2]):
            buckets = BUCKETS if step else FIRST_BUCKETS
            for index, names in enumerate(buckets):
                gradient = torch.cat([gradients(rank, step, name) for name in names])
                with stream_context(elsewhere):
                    buffer = allocate(torch.zeros_like(gradient))
                memory = raw(buffer)
                backward[step % 2].queue(partial(memory.copy_, gradient))
                bucket = Bucket(index, [parameters[name] for name in names], buffer, index + 1 == len(buckets))
                futures.append((call_hook(state, bucket), names, memory))
                kept.append(buffer)
        with stream_context(reader):
            for future, names, memory in futures:
                wait_as_ddp(future)
                reader.queue(partial(read, memory, names, votes[step]))
        if step % 2:
            reader.run(len(reader.tasks))
        if step == 2:
            # Not always: what is freed has its streams do what was begun.
            kept.clear()
    allocations, waits = DEVICE.allocations - allocations, DEVICE.waits + DEVICE.pinned - waits
    waits_of_worker = DEVICE.waits_of_workers - waits_of_worker
    nonfinite = state.stats().nonfinite
    states = [state]
    del state
    finish(states, parameters, elsewhere)
    return Outcome(votes, nonfinite, allocations, waits, waits_of_worker, DEVICE.tasks_in_the_way)


def train_on_the_cpu(**options: Any) -> Outcome:
    """The same votes by a rank without a device."""
    parameters = {name: nn.Parameter(torch.zeros(numel)) for name, numel in NUMELS.items()}
    state = new_state(parameters, **options)
    votes: Votes = [{} for _ in range(STEPS)]
    for step in range(STEPS):
        if step == SAVED_AT:
            saved = state.state_dict()
            state = new_state(parameters, **options)
            state.load_state_dict(saved)
        buckets = BUCKETS if step else FIRST_BUCKETS
        for index, names in enumerate(buckets):
            buffer = torch.cat([gradients(dist.get_rank(), step, name) for name in names])
            bucket = Bucket(index, [parameters[name] for name in names], buffer, index + 1 == len(buckets))
            read(call_hook(state, bucket).wait(), names, votes[step])
    nonfinite = state.stats().nonfinite
    call_hook(state, Bucket(0, [parameters["b"]], torch.zeros(NUMELS["b"]), False)).wait()  # as in finish()
    return Outcome(votes, nonfinite)


def new_state(
    parameters: dict[str, nn.Parameter],
    *,
    weights: list[int] | None = None,
    switch: int | None = None,
    has_rule: bool = False,
    **options: Any,
) -> MajorityVoteState:
    state = MajorityVoteState(**options)
    state.name_parameters(parameters.items())
    if weights is not None:
        state.weight = weights[dist.get_rank()]
    if has_rule:
        rule = CalibratedSwitch(beta=0.999 if switch is None else 0.5, tolerance=1e9)  # of 1000 votes, or of two
        state.switch_to_dense(rule=rule, lr=0.1)
    elif switch is not None:
        state.switch_to_dense(switch)
    return state


def read(memory: torch.Tensor, names: list[str], votes: dict[str, torch.Tensor]) -> None:
    for name, piece in zip(names, torch.split(memory.clone(), [NUMELS[name] for name in names]), strict=True):
        votes[name] = piece


def finish(states: list[MajorityVoteState], parameters: dict[str, nn.Parameter], elsewhere: Stream) -> None:
    """A last vote that nobody waits for, as when an earlier bucket has raised, and whose memory is freed.

    ``states`` has the last reference to the state.
    """
    state = states.pop()
    with stream_context(elsewhere):
        buffer = allocate(torch.zeros(NUMELS["b"]))
    with stream_context(Stream()):
        future = call_hook(state, Bucket(0, [parameters["b"]], buffer, False))
    deadline = time.monotonic() + 30
    while not future.is_done.is_set() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert future.is_done.is_set()
    state.channel()._worker.shutdown()  # until then what it did last keeps the memory
    del future, state
    gc.collect()
    del buffer  # only now: what is freed has its streams do what was begun
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
            if name == "on_device":
                return nullcontext()
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


Seen = set[tuple[str, int, str]]


def train_on_the_simulated_device(
    place: tuple[str, int] | None = None, checks_times: bool = True, options: dict[str, Any] | None = None
) -> tuple[Outcome, Seen]:
    seen: Seen = set()
    with simulated(), buckets_of_ours(), left_out(place, seen):
        DEVICE.checks_times = checks_times
        return train(**options or {}), seen


def train_on_mixed_ranks(cpu_rank: int, options: dict[str, Any]) -> tuple[Outcome, Seen]:
    if dist.get_rank() != cpu_rank:
        return train_on_the_simulated_device(options=options)
    with buckets_of_ours():
        return train_on_the_cpu(**options), set()


def what_goes_wrong(
    outcomes: list[Any],
    options: dict[str, Any] | None = None,
    *,
    may_allocate: bool = False,
    worker_may_wait: bool = False,
) -> tuple[str, str] | None:
    """The kind of what is wrong with the votes of all ranks, or with what they cost, if anything; and its text."""
    options = options or {}
    errors = [str(outcome) for outcome in outcomes if isinstance(outcome, BaseException)]
    if errors:
        # Of several ranks one may only tell of the end of another.
        found = [(kind, said) for error in errors for said, kind in KINDS.items() if said in error]
        return found[0] if found else (OTHER, errors[0])
    simulated_options = {name: value for name, value in options.items() if name != "has_rule"}
    simulation = Simulation(len(outcomes), list(NUMELS), **simulated_options)
    for step in range(STEPS):
        local = [{name: gradients(rank, step, name) for name in NUMELS} for rank in range(len(outcomes))]
        expected = simulation.vote(local)
        if step == POISONED[1]:
            expected.update({name: torch.full_like(expected[name], torch.nan) for name in ("a", "c")})
        for outcome, _ in outcomes:
            votes = outcome.votes[step]
            for name in NUMELS:
                if name not in votes or not votes[name].allclose(expected[name], 0, 0, equal_nan=True):
                    return VOTES, f"in step {step}"
    for outcome, _ in outcomes:
        if outcome.nonfinite != 1:
            return VOTES, f"{outcome.nonfinite} coordinates are not finite"
        if outcome.tasks_in_the_way:
            return COST, f"{outcome.tasks_in_the_way} tasks on the default stream"
        waits = outcome.waits + (0 if worker_may_wait else outcome.waits_of_worker)
        if waits or (outcome.allocations and not may_allocate):
            return COST, f"{outcome.allocations} allocations, {waits} waits"
    return None


def expected_without(source: str, line: int, name: str) -> set[str | None]:
    """What may go wrong without one line. Times are not looked at, so that they hide nothing else."""
    path = next(path for path, short in SOURCES.items() if short == source)
    if name == "record" and "_began" in linecache.getline(path, line):
        return {None}
    allowed: dict[str, set[str | None]] = {
        "pin_memory": {COST},
        "on_device": {DEVICE_USED},
        "stream": {VOTES, MEMORY, COST},
    }
    return allowed.get(name, {VOTES, MEMORY})
