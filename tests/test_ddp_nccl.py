"""The exchange between CUDA devices, on the simulated ones, with gloo's collectives in place of NCCL's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import simulated_cuda
import simulated_ops
from ranks import RankPool
from signvote.ddp import MajorityVoteState, attach, channel, codec
from simulated_cuda import DEVICE, allocate, raw
from simulated_jobs import (
    OPTIONS,
    Bucket,
    buckets_of_ours,
    call_hook,
    expected_without,
    train_on_the_simulated_device,
    what_goes_wrong,
)
from simulated_ops import simulated


def without_weights(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "weights"}


@pytest.mark.parametrize("topology", ["sharded", "allgather", "auto"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_votes_are_in_order(ranks: RankPool, world: int, topology: str) -> None:
    options = {"topology": topology, "backend": "nccl"}
    outcomes = ranks.outcomes(train_on_the_simulated_device, None, True, options, world=world)
    assert what_goes_wrong(outcomes, options, worker_may_wait=True) is None


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("topology", ["sharded", "allgather"])
def test_votes_with_options_are_in_order(ranks: RankPool, topology: str, name: str) -> None:
    options = without_weights(OPTIONS[name]) | {"topology": topology, "backend": "nccl"}
    outcomes = ranks.outcomes(train_on_the_simulated_device, None, True, options, world=2)
    assert what_goes_wrong(outcomes, options, may_allocate=True, worker_may_wait=True) is None


def test_every_line_that_orders_is_needed(ranks: RankPool) -> None:
    """Of those that are for this exchange alone."""
    (_, always), _ = ranks.run(train_on_the_simulated_device, world=2)
    options = {"backend": "nccl"}
    (_, seen), _ = ranks.run(train_on_the_simulated_device, None, True, options, world=2)
    assert {name for _, _, name in seen - always} == {"on_device", "stream", "record_stream"}
    for source, line, name in sorted(seen - always):
        outcomes = ranks.outcomes(train_on_the_simulated_device, (source, line), False, options, world=2)
        problem = what_goes_wrong(outcomes, options, worker_may_wait=True)
        print(f"{source}:{line} without {name}: {problem}")
        assert problem is not None, (source, line, name)
        assert problem[0] in expected_without(source, line, name), (source, line, name, problem)


def error_of_one_vote(gradient: torch.Tensor | None = None, **options: Any) -> str:
    """Of a state with ``options``, on the simulated device unless there is a gradient elsewhere."""
    parameter = nn.Parameter(torch.zeros(100))
    with simulated(), buckets_of_ours():
        state = MajorityVoteState(**options)
        bucket = Bucket(0, [parameter], allocate(torch.zeros(100)) if gradient is None else gradient, True)
        with pytest.raises((RuntimeError, ValueError)) as info:
            call_hook(state, bucket).wait()
    return str(info.value)


def vote_by_another_backend() -> str:
    return error_of_one_vote(backend=("gloo", "nccl")[dist.get_rank()])


def test_ranks_with_different_backends_say_so(ranks: RankPool) -> None:
    for error in ranks.run(vote_by_another_backend, world=2):
        assert error == 'signvote: ranks disagree on backend: "gloo" on rank 0, "nccl" on rank 1'


def is_stuck(event: simulated_cuda.Event) -> bool:
    """As ``query`` of an event, if no collective is ever done."""
    assert event.place is not None
    stream, end = event.place
    return not any(queued_on is stream and task < end for queued_on, task in DEVICE.collectives)


@contextmanager
def stuck() -> Iterator[mock.Mock]:
    """No collective is ever done; the group's backend for CUDA devices."""
    backend = mock.Mock()
    right = dist.ProcessGroup._get_backend

    def backend_of(group: dist.ProcessGroup, device: torch.device) -> Any:
        return backend if device.type == "cuda" else right(group, device)

    with (
        mock.patch.object(simulated_cuda.Event, "query", is_stuck),
        mock.patch.object(dist.ProcessGroup, "_get_backend", backend_of),
    ):
        yield backend


def wait_for_ever() -> tuple[str, int, float]:
    """The error, how often NCCL was told to give up, and after which time it would have ended the process."""
    with stuck() as backend:
        error = error_of_one_vote(backend="nccl", timeout=timedelta(seconds=2))
        (watchdog,) = backend._set_default_timeout.call_args.args
        return error, backend.abort.call_count, watchdog.total_seconds()


def test_wait_for_the_device_ends(ranks: RankPool) -> None:
    ((error, aborts, watchdog),) = ranks.run(wait_for_ever, world=1)
    assert error == "signvote: rank 0, step 1, bucket 0: exchange of signs: not done on cuda:1 after 0:00:02"
    assert aborts == 1
    assert watchdog > 4


def fail_while_another_bucket_is_packed() -> int:
    """How often a number was asked for on the stream on which a collective is stuck: it never answers."""
    parameters = [nn.Parameter(torch.zeros(100)) for _ in range(2)]
    with simulated(), buckets_of_ours(), stuck(), mock.patch.object(codec, "popcount", return_value=0) as counted:
        state = MajorityVoteState(backend="nccl", abstain=True, timeout=timedelta(seconds=2))
        futures = [call_hook(state, Bucket(i, [parameters[i]], allocate(torch.zeros(100)), i == 1)) for i in range(2)]
        for future in futures:
            with pytest.raises(RuntimeError, match="bucket 0: exchange of signs: not done"):
                future.wait()
        return int(counted.call_count)


def test_after_a_failure_nothing_is_asked_of_the_device(ranks: RankPool) -> None:
    assert ranks.run(fail_while_another_bucket_is_packed, world=1) == [1]


def make_a_group_with_a_bound_device() -> list[torch.device | None]:
    """The device of the default group while a group is made for NCCL, and afterwards."""
    default = dist.distributed_c10d._get_default_group()
    default.bound_device_id = torch.device("cuda:0")
    found = []

    def new_group(*arguments: Any, **options: Any) -> Any:
        found.append(default.bound_device_id)
        return simulated_ops.Nccl.new_group(*arguments, **options)

    try:
        with simulated(), mock.patch.object(dist, "new_group", new_group):
            MajorityVoteState(backend="nccl").channel()
        return [*found, default.bound_device_id]
    finally:
        default.bound_device_id = None


def test_a_new_group_connects_later(ranks: RankPool) -> None:
    assert ranks.run(make_a_group_with_a_bound_device, world=2) == [[None, torch.device("cuda:0")]] * 2


def timeout_of_a_group_without_cpu() -> timedelta | None:
    return channel._timeout_of(dist.new_group(backend="cuda:gloo", timeout=timedelta(seconds=7)))


def test_timeout_of_a_group_for_devices_is_found(ranks: RankPool) -> None:
    assert ranks.run(timeout_of_a_group_without_cpu, world=1) == [timedelta(seconds=7)]


def vote_on_the_cpu() -> str:
    return error_of_one_vote(torch.zeros(100), backend="nccl")


def test_gradients_on_the_cpu_are_refused(ranks: RankPool) -> None:
    assert ranks.run(vote_on_the_cpu, world=1) == [
        "majority_vote_hook: bucket 0: expected gradients on a CUDA device with backend='nccl', got cpu"
    ]


@mock.patch.object(dist, "is_nccl_available", return_value=False)
def vote_without_nccl(_: object) -> str:
    with pytest.raises(RuntimeError) as info:
        MajorityVoteState(backend="nccl").channel()
    return str(info.value)


def test_torch_without_nccl_is_named(ranks: RankPool) -> None:
    assert ranks.run(vote_without_nccl, world=1) == [
        "signvote: rank 0: new group: backend: expected 'gloo', as this torch is built without NCCL, got 'nccl'"
    ]


def refused_by_attach() -> list[str]:
    found = []
    for option in ("find_unused_parameters", "static_graph", None):
        ddp = DistributedDataParallel(nn.Sequential(nn.Linear(3, 2)), **({option: True} if option else {}))  # type: ignore[arg-type]
        if option is None:
            ddp.module[0] = nn.SyncBatchNorm(3)  # only now: DDP itself has it on a GPU only
        with pytest.raises(ValueError, match="attach: ddp") as info:
            attach(ddp, backend="nccl")
        found.append(str(info.value).split("backend='nccl', ")[1].split(": two")[0])
    return found


def test_nothing_else_uses_nccl_meanwhile(ranks: RankPool) -> None:
    assert ranks.run(refused_by_attach, world=1) == [
        ["got find_unused_parameters", "got static_graph", "got 0: SyncBatchNorm"]
    ]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"backend": "mpi"}, "backend: expected one of 'gloo', 'nccl', got 'mpi'"),
        (
            {"backend": "nccl", "topology": "server"},
            "topology: expected 'sharded', 'allgather' or 'auto' with",
        ),
        ({"backend": "nccl", "weight": 2}, "weight: expected 1 with backend='nccl', got 2"),
        ({"backend": "nccl", "implementation": "portable"}, "implementation: expected None with backend='nccl', got"),
    ],
)
def test_options_that_it_cannot_have(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        MajorityVoteState(**options)


def count_copies() -> tuple[int, int]:
    """Bytes of the messages on the host, and of the words there in all, after a vote on a device."""
    parameter = nn.Parameter(torch.zeros(100_000))
    with simulated(), buckets_of_ours():
        state = MajorityVoteState(backend="nccl")
        buffer = allocate(torch.ones(100_000))
        call_hook(state, Bucket(0, [parameter], buffer, True)).wait()
        (plan,) = state._plans
        messages = [value for value in vars(plan.exchange).values() if hasattr(value, "ends")]
        DEVICE.finish()
        assert raw(buffer).eq(1).all()
        return sum(m.ends.nbytes for m in messages), sum(m.words.nbytes for m in messages if not m.words.is_cuda)


def test_words_stay_on_the_device(ranks: RankPool) -> None:
    for on_the_host, words in ranks.run(count_copies, world=2):
        assert 0 < on_the_host < 200
        assert words == 0
