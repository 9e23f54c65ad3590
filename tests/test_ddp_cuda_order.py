"""What the hook begins on a CUDA device is ordered: shown without a GPU, on the device that simulated_cuda describes.

The whole hook runs, on real gloo ranks, with kernels of the CPU that are done as late as streams and events allow. Then
each line that orders them is left out, one after the other, and each time what must go wrong then does.
"""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import simulated_cuda
from ranks import RankPool
from signvote import cuda, cuda_runs, runs
from signvote.ddp import MajorityVoteState, cuda_codec, voter
from simulated_cuda import DEVICE, Stream, allocate, raw, stream_context
from simulated_jobs import (
    OPTIONS,
    TIMES,
    Bucket,
    buckets_of_ours,
    call_hook,
    expected_without,
    train_on_mixed_ranks,
    train_on_the_simulated_device,
    wait_as_ddp,
    what_goes_wrong,
)
from simulated_ops import simulated

# These need memory of the device while they pack, from the caching allocator.
TEMPORARIES = {"abstain_lion", "relative_threshold", "noise", "noise_and_threshold", "mean_abs", "rule", "everything"}


@pytest.mark.parametrize("topology", ["sharded", "allgather", "server"])
def test_order(ranks: RankPool, topology: str) -> None:
    options = {"topology": topology}
    assert what_goes_wrong(ranks.outcomes(train_on_the_simulated_device, None, True, options, world=2)) is None


@pytest.mark.parametrize("options", OPTIONS)
def test_order_with_options(ranks: RankPool, options: str) -> None:
    outcomes = ranks.outcomes(train_on_the_simulated_device, None, True, OPTIONS[options], world=2)
    assert what_goes_wrong(outcomes, OPTIONS[options], may_allocate=options in TEMPORARIES) is None


@pytest.mark.parametrize("options", OPTIONS)
def test_ranks_with_and_without_a_device_vote_together_with_options(ranks: RankPool, options: str) -> None:
    outcomes = ranks.outcomes(train_on_mixed_ranks, 1, OPTIONS[options], world=2)
    assert what_goes_wrong(outcomes, OPTIONS[options], may_allocate=options in TEMPORARIES) is None


@pytest.mark.parametrize("topology", ["sharded", "allgather", "server"])
@pytest.mark.parametrize("cpu_rank", [0, 1])
def test_ranks_with_and_without_a_device_vote_together(ranks: RankPool, cpu_rank: int, topology: str) -> None:
    outcomes = ranks.outcomes(train_on_mixed_ranks, cpu_rank, {"topology": topology}, world=2)
    assert what_goes_wrong(outcomes) is None


def test_every_line_that_orders_is_needed(ranks: RankPool) -> None:
    (_, seen), _ = ranks.run(train_on_the_simulated_device, world=2)
    assert len(seen) >= 19
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
    for options in ["mean_abs", "switch_by_a_rule", "rule"]:
        (_, seen), _ = ranks.run(train_on_the_simulated_device, None, True, OPTIONS[options], world=2)
        for source, line, name in sorted(seen - always):
            arguments = (source, line), False, OPTIONS[options]
            outcomes = ranks.outcomes(train_on_the_simulated_device, *arguments, world=2)
            problem = what_goes_wrong(outcomes, OPTIONS[options], may_allocate=options in TEMPORARIES)
            print(f"{source}:{line} without {name}, {options}: {problem}")
            problems.setdefault((source, line, name), set()).update(problem[:1] if problem else ())
    assert len(problems) >= 5
    for place, found in problems.items():
        assert found, place
        assert found <= expected_without(*place), place


def fail_with_work_on_the_device(waits_also_after_a_failure: bool) -> None:
    """An exchange fails while the next bucket is packed on another stream than its momentum was made on."""
    parameters = [nn.Parameter(torch.zeros(100)) for _ in range(2)]
    settle = cuda_codec.CudaCodec.settle
    states: list[MajorityVoteState] = []

    def settle_unless_failed(codec: cuda_codec.CudaCodec) -> None:
        if states[0].failure is None:
            settle(codec)

    def buckets() -> list[Bucket]:
        return [Bucket(i, [parameters[i]], allocate(torch.zeros(100)), i == 1) for i in range(2)]

    patched = settle if waits_also_after_a_failure else settle_unless_failed
    with simulated(), buckets_of_ours(), mock.patch.object(cuda_codec.CudaCodec, "settle", patched):
        state = MajorityVoteState()
        states.append(state)
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
        states.clear()
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
