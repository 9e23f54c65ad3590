"""What the hook begins on a CUDA device is ordered: shown without a GPU, on the device that simulated_cuda describes.

The whole hook runs, on real gloo ranks, with kernels of the CPU that are done as late as streams and events allow. Then
each line that orders them is left out, one after the other, and each time what must go wrong then does.
"""

from __future__ import annotations

import gc
import linecache
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import simulated_cuda
from ddp_simulation import Simulation
from ranks import RankPool
from signvote import cuda, cuda_runs, runs
from signvote.ddp import CalibratedSwitch, MajorityVoteState, cuda_codec, hook, majority_vote_hook, momentum, voter
from simulated_cuda import DEVICE, Stream, allocate, raw, simulated, stream_context

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
# These need memory of the device while they pack, from the caching allocator.
TEMPORARIES = {"abstain_lion", "relative_threshold", "noise", "noise_and_threshold", "mean_abs", "rule", "everything"}
# In one of these, a line shows that only options need.
REVEALING = ["mean_abs", "switch_by_a_rule", "rule"]

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
SOURCES = {str(module.__file__): Path(str(module.__file__)).name for module in (cuda_codec, hook, momentum)}

# What can go wrong, by what an error says. A message that is copied too early or too late shows in its trailer: it is
# then another one's, or has counts of garbage.
VOTES, MEMORY, COST, DEVICE_USED, TIMES, OTHER = "votes", "freed memory", "cost", "wrong device", "times", "other"
KINDS = {
    simulated_cuda.FREED_MEMORY: MEMORY,
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

    ``allocations`` are of memory of the device; ``waits`` are those of the thread that computes, and for copies, and
    memory that is pinned.
    """

    votes: Votes
    nonfinite: int
    allocations: int = 0
    waits: int = 0


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
    allocations = waits = 0
    for step in range(STEPS):
        futures = []
        if step == SAVED_AT:
            saved = state.state_dict()
            state = new_state(parameters, **options)
            state.load_state_dict(saved)
        if step == STEADY:
            allocations, waits = DEVICE.allocations, DEVICE.waits + DEVICE.pinned
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
    nonfinite = state.stats().nonfinite
    states = [state]
    del state
    finish(states, parameters, elsewhere)
    return Outcome(votes, nonfinite, allocations, waits)


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


def what_goes_wrong(outcomes: list[Any], options: str = "") -> tuple[str, str] | None:
    """The kind of what is wrong with the votes of all ranks, or with what they cost, if anything; and its text."""
    errors = [str(outcome) for outcome in outcomes if isinstance(outcome, BaseException)]
    if errors:
        # Of several ranks one may only tell of the end of another.
        found = [(kind, said) for error in errors for said, kind in KINDS.items() if said in error]
        return found[0] if found else (OTHER, errors[0])
    simulated_options = {name: value for name, value in OPTIONS.get(options, {}).items() if name != "has_rule"}
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
        if outcome.waits or (outcome.allocations and options not in TEMPORARIES):
            return COST, f"{outcome.allocations} allocations, {outcome.waits} waits"
    return None


@pytest.mark.parametrize("topology", ["sharded", "allgather", "server"])
def test_order(ranks: RankPool, topology: str) -> None:
    options = {"topology": topology}
    assert what_goes_wrong(ranks.outcomes(train_on_the_simulated_device, None, True, options, world=2)) is None


@pytest.mark.parametrize("options", OPTIONS)
def test_order_with_options(ranks: RankPool, options: str) -> None:
    outcomes = ranks.outcomes(train_on_the_simulated_device, None, True, OPTIONS[options], world=2)
    assert what_goes_wrong(outcomes, options) is None


@pytest.mark.parametrize("options", OPTIONS)
def test_ranks_with_and_without_a_device_vote_together_with_options(ranks: RankPool, options: str) -> None:
    outcomes = ranks.outcomes(train_on_mixed_ranks, 1, OPTIONS[options], world=2)
    assert what_goes_wrong(outcomes, options) is None


@pytest.mark.parametrize("topology", ["sharded", "allgather", "server"])
@pytest.mark.parametrize("cpu_rank", [0, 1])
def test_ranks_with_and_without_a_device_vote_together(ranks: RankPool, cpu_rank: int, topology: str) -> None:
    outcomes = ranks.outcomes(train_on_mixed_ranks, cpu_rank, {"topology": topology}, world=2)
    assert what_goes_wrong(outcomes) is None


def expected_without(source: str, line: int, name: str) -> set[str | None]:
    """What may go wrong without one line. Times are not looked at, so that they hide nothing else."""
    path = next(path for path, short in SOURCES.items() if short == source)
    if name == "record" and "_began" in linecache.getline(path, line):
        return {None}
    return {"pin_memory": {COST}, "on_device": {DEVICE_USED}}.get(name, {VOTES, MEMORY})  # type: ignore[return-value]


def test_every_line_that_orders_is_needed(ranks: RankPool) -> None:
    (_, seen), _ = ranks.run(train_on_the_simulated_device, world=2)
    assert len(seen) >= 20
    assert len({(source, line) for source, line, _ in seen}) == len(seen)
    surprises, timing = [], []
    for source, line, name in sorted(seen):
        problem = what_goes_wrong(ranks.outcomes(train_on_the_simulated_device, (source, line), False, world=2))
        print(f"{source}:{line} without {name}: {problem}")
        allowed = expected_without(source, line, name)
        if (problem and problem[0]) not in allowed:
            surprises.append((source, line, name, problem))
        if allowed == {None}:
            timing.append((source, line))
    assert surprises == []
    assert len(timing) == 2
    for place in timing:
        problem = what_goes_wrong(ranks.outcomes(train_on_the_simulated_device, place, True, world=2))
        assert problem is not None
        assert problem[0] == TIMES


def test_every_line_that_orders_options_is_needed(ranks: RankPool) -> None:
    (_, always), _ = ranks.run(train_on_the_simulated_device, world=2)
    problems: dict[tuple[str, int, str], set[str]] = {}
    for options in REVEALING:
        (_, seen), _ = ranks.run(train_on_the_simulated_device, None, True, OPTIONS[options], world=2)
        for source, line, name in sorted(seen - always):
            arguments = (source, line), False, OPTIONS[options]
            problem = what_goes_wrong(ranks.outcomes(train_on_the_simulated_device, *arguments, world=2), options)
            print(f"{source}:{line} without {name}, {options}: {problem}")
            problems.setdefault((source, line, name), set()).update(problem[:1] if problem else ())
    assert len(problems) >= 5
    for place, found in problems.items():
        assert found, place
        assert found <= expected_without(*place), place


def fail_with_work_on_the_device(waits_also_after_a_failure: bool) -> None:
    """An exchange fails while the next bucket is packed on another stream than its momentum was made on."""
    parameters = [nn.Parameter(torch.zeros(100)) for _ in range(2)]
    finish_message = hook._finish_message

    def finish_unless_failed(vote: Any) -> None:
        if vote.state.failure is None:
            finish_message(vote)

    def buckets() -> list[Bucket]:
        return [Bucket(i, [parameters[i]], allocate(torch.zeros(100)), i == 1) for i in range(2)]

    patched = finish_message if waits_also_after_a_failure else finish_unless_failed
    with simulated(), buckets_of_ours(), mock.patch.object(hook, "_finish_message", patched):
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
        assert simulated_cuda.FREED_MEMORY in str(outcome)


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
        "majority_vote_hook: bucket 1: expected gradients on cuda:1, as before, got cpu: all gradients of a state are "
        "on one device; use one process for each device"
    ]


def one_bucket(state: MajorityVoteState, parameter: nn.Parameter) -> Any:
    return call_hook(state, Bucket(0, [parameter], allocate(torch.zeros(100)), True))


def move_to_the_device() -> None:
    """A state that has voted on the CPU goes on on the device, once it has been closed."""
    state, parameter = MajorityVoteState(), nn.Parameter(torch.zeros(100))
    with buckets_of_ours():
        call_hook(state, Bucket(0, [parameter], torch.zeros(100), True)).wait()
        plan = weakref.ref(next(iter(state._plans)).exchange)
        state.close()
        gc.collect()
        assert plan() is None
        with simulated():
            one_bucket(state, parameter).wait()
            DEVICE.finish()


def test_closed_state_lets_go_of_memory_and_device(ranks: RankPool) -> None:
    ranks.run(move_to_the_device, world=2)


def fail_on_the_device(op: str) -> list[str]:
    """Errors of a first vote in which ``op`` fails, and of the next one."""
    state, parameter = MajorityVoteState(), nn.Parameter(torch.zeros(100))
    errors = []
    with simulated(), buckets_of_ours():
        with mock.patch.object(cuda_runs, op, side_effect=RuntimeError("CUDA error: out of luck")):
            with pytest.raises(RuntimeError) as info:
                one_bucket(state, parameter).wait()
            errors.append(str(info.value))
        with pytest.raises(RuntimeError) as info:
            one_bucket(state, parameter)
        errors.append(str(info.value))
    return errors


@pytest.mark.parametrize(("op", "phase"), [("pack_runs", "packing"), ("unpack_runs", "unpacking")])
def test_errors_of_the_device_name_the_phase_and_stay(ranks: RankPool, op: str, phase: str) -> None:
    expected = f"signvote: rank 0, step 1, bucket 0: {phase} on cuda:1: CUDA error: out of luck"
    assert ranks.run(fail_on_the_device, op, world=1) == [[expected] * 2]


def wait_on_a_device_that_is_gone() -> str:
    state, parameter = MajorityVoteState(), nn.Parameter(torch.zeros(100))
    gone = RuntimeError("CUDA error: fallen off the bus")
    with (
        simulated(),
        buckets_of_ours(),
        mock.patch.object(simulated_cuda.Event, "synchronize", side_effect=gone),
        pytest.raises(RuntimeError) as info,
    ):
        one_bucket(state, parameter).wait()
    return str(info.value)


def test_error_found_by_waiting_names_the_phase(ranks: RankPool) -> None:
    expected = "signvote: rank 0, step 1, bucket 0: packing on cuda:1: CUDA error: fallen off the bus"
    assert ranks.run(wait_on_a_device_that_is_gone, world=1) == [expected]


def fail_on_the_way_to_the_callback(owner: Any, name: str) -> list[str]:
    state, parameter = MajorityVoteState(), nn.Parameter(torch.zeros(100))
    right, errors = getattr(owner, name), []

    def fail_on_the_worker(*arguments: Any) -> Any:
        if threading.current_thread().name.startswith("signvote") and arguments[1:] in ((None,), ()):
            raise RuntimeError("CUDA error: fallen off the bus")
        return right(*arguments)

    with simulated(), buckets_of_ours():
        with mock.patch.object(owner, name, fail_on_the_worker):
            with pytest.raises(RuntimeError) as info:
                wait_as_ddp(one_bucket(state, parameter))
            errors.append(str(info.value))
        with pytest.raises(RuntimeError) as info:
            one_bucket(state, parameter)
        errors.append(str(info.value))
    return errors


@pytest.mark.parametrize(
    ("owner", "name"),
    [(simulated_cuda.Future, "set_result"), (cuda_codec.CudaCodec, "on_device")],
    ids=["future", "device"],
)
def test_error_on_the_way_to_the_callback_ends_the_backward_pass(ranks: RankPool, owner: Any, name: str) -> None:
    expected = "signvote: rank 0, step 1, bucket 0: CUDA error: fallen off the bus"
    assert ranks.run(fail_on_the_way_to_the_callback, owner, name, world=1) == [
        [f"Unable to cast {expected} to Tensor", expected]
    ]


def vote_with_another_default_device(has_device: bool, topology: str) -> None:
    state, parameter = MajorityVoteState(topology=topology), nn.Parameter(torch.zeros(100))
    with simulated() if has_device else nullcontext(), buckets_of_ours():
        buffer = allocate(torch.zeros(100)) if has_device else torch.zeros(100)
        bucket = Bucket(0, [parameter], buffer, True)
        with torch.device("meta"):
            future = call_hook(state, bucket)
        future.wait()
        if has_device:
            DEVICE.finish()
        assert raw(buffer).abs().tolist() == [1.0] * 100


@pytest.mark.parametrize("topology", ["sharded", "allgather", "server"])
@pytest.mark.parametrize("has_device", [False, True])
def test_memory_is_the_hosts_whatever_the_default_device(ranks: RankPool, has_device: bool, topology: str) -> None:
    ranks.run(vote_with_another_default_device, has_device, topology, world=2)


def capture_a_graph() -> None:
    with (
        simulated(),
        buckets_of_ours(),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        pytest.raises(RuntimeError, match="bucket 0: expected a backward pass outside of CUDA graphs"),
    ):
        one_bucket(MajorityVoteState(), nn.Parameter(torch.zeros(100)))


def test_capture_of_a_graph_is_refused(ranks: RankPool) -> None:
    ranks.run(capture_a_graph, world=1)


def use_threads() -> tuple[list[int], int]:
    """How many threads the votes of three buckets used, and torch's setting."""
    state, parameters = MajorityVoteState(), [nn.Parameter(torch.zeros(100)) for _ in range(3)]
    used: list[int] = []

    def recording(*arguments: Any, **options: Any) -> Any:
        used.append(options["num_threads"])
        return runs.vote_runs(*arguments, **options)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with simulated(), buckets_of_ours(), mock.patch.object(voter, "vote_runs", recording):
            for i, parameter in enumerate(parameters):
                call_hook(state, Bucket(i, [parameter], allocate(torch.zeros(100)), i == 2)).wait()
        return used, torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def test_votes_beside_a_backward_pass_on_the_device_use_all_threads(ranks: RankPool) -> None:
    assert ranks.run(use_threads, world=2) == [([3, 3, 3], 3)] * 2


def test_first_cuda_bucket_needs_the_cuda_part(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(), buckets_of_ours():
        bucket = Bucket(0, [nn.Parameter(torch.zeros(100))], allocate(torch.zeros(100)), True)
    monkeypatch.setattr(cuda, "find_module", lambda: None)
    expected = "majority_vote_hook: bucket 0 is on device cuda:1, but signvote was built without its CUDA part: "
    with buckets_of_ours(), pytest.raises(RuntimeError, match=expected) as info:
        call_hook(MajorityVoteState(), bucket)
    assert cuda.BUILD_COMMAND in str(info.value)


def test_other_devices_are_refused() -> None:
    bucket = Bucket(3, [nn.Parameter(torch.zeros(8, device="meta"))], torch.zeros(8, device="meta"), True)
    with buckets_of_ours(), pytest.raises(ValueError, match="bucket 3: expected gradients on the CPU or on a CUDA dev"):
        call_hook(MajorityVoteState(), bucket)
