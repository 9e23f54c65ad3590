"""The hook on a GPU: real gloo ranks that share one, against the single-process simulation, bit for bit.

How its work on the device is ordered is also tested without one, in test_ddp_cuda_order.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ddp_jobs import Job, Outcome, batches, build, digest, in_memory_order, step, train
from ranks import RankPool
from signvote.ddp import CalibratedSwitch, MajorityVoteState
from signvote.ddp.cuda_codec import CudaCodec
from test_ddp_training import FEATURES, OPTIONS, TINY_BUCKETS, check_against_simulation

GPU = ("cuda:0",)
TIMEOUT = 120.0
CYCLES = 20_000_000  # some 10 ms

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def train_to_bytes(job: Job) -> bytes:
    """Between processes, tensors as such would take a file descriptor each."""
    return pickle.dumps(train(job))


def check(ranks: RankPool, job: Job, world: int, run: Callable[[Job], bytes] = train_to_bytes) -> None:
    """All votes of ``job`` are those of the simulation."""
    outcomes: list[Outcome] = [pickle.loads(found) for found in ranks.run(run, job, world=world, timeout=TIMEOUT)]
    check_against_simulation(job, outcomes)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("world", [2, 4])
def test_equals_simulation(ranks: RankPool, feature: str, world: int) -> None:
    check(ranks, replace(FEATURES[feature], devices=GPU), world)


@pytest.mark.parametrize("topology", ["allgather", "server", "auto"])
@pytest.mark.parametrize("world", [2, 4])
def test_topologies_equal_simulation(ranks: RankPool, topology: str, world: int) -> None:
    check(ranks, Job(options={"topology": topology}, ddp=TINY_BUCKETS, devices=GPU), world)


@pytest.mark.parametrize("options", OPTIONS)
def test_options_equal_simulation(ranks: RankPool, options: str) -> None:
    check(ranks, Job("rows", options=OPTIONS[options], ddp=TINY_BUCKETS, devices=GPU), 2)


@pytest.mark.parametrize("feature", ["rebuilt_buckets", "mixed_dtypes", "untouched_rows", "weights", "switch_to_dense"])
def test_ranks_on_cpu_and_gpu_vote_together(ranks: RankPool, feature: str) -> None:
    check(ranks, replace(FEATURES[feature], devices=("cpu", *GPU)), 4)


@pytest.mark.parametrize("model", ["rows", "mixed"])
@pytest.mark.parametrize("options", ["relative_threshold", "exclude", "dithered_lion", "abstain_with_everything"])
def test_options_of_ranks_on_cpu_and_gpu_equal_simulation(ranks: RankPool, options: str, model: str) -> None:
    """Each draws the noise of its own device."""
    check(ranks, Job(model, options=OPTIONS[options], ddp=TINY_BUCKETS, devices=("cpu", *GPU), weights=(2, 1)), 2)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("topology", ["sharded", "allgather"])
def test_options_over_nccl_equal_simulation(ranks: RankPool, topology: str, options: str) -> None:
    """One rank on each GPU: NCCL does not let them share one."""
    if not dist.is_nccl_available():
        pytest.skip("torch is built without NCCL")
    devices = tuple(f"cuda:{index}" for index in range(min(2, torch.cuda.device_count())))
    chosen = OPTIONS[options] | {"topology": topology, "backend": "nccl"}
    check(ranks, Job("rows", options=chosen, ddp=TINY_BUCKETS, devices=devices), len(devices))


@contextmanager
def no_waits() -> Iterator[None]:
    """What packs and unpacks fails where it makes the host wait for the device."""

    def checked(right: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return right(*arguments, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    with ExitStack() as stack:
        for name in ("pack", "progress", "unpack"):
            stack.enter_context(mock.patch.object(CudaCodec, name, checked(getattr(CudaCodec, name))))
        yield


def train_without_waits(job: Job) -> bytes:
    with no_waits():
        return train_to_bytes(job)


@pytest.mark.parametrize("options", OPTIONS)
def test_options_do_not_wait_for_the_device(ranks: RankPool, options: str) -> None:
    job = Job("rows", options=OPTIONS[options], ddp=TINY_BUCKETS, devices=GPU, switch=10)
    check(ranks, job, 2, train_without_waits)


def switch_by_a_rule(job: Job) -> tuple[int | None, float | None]:
    """The step from which on the mean is taken, and the learning rate of SGD."""
    ddp, state, _ = build(job)
    state.switch_to_dense(rule=CalibratedSwitch(beta=0.5, tolerance=0.5), lr=0.01)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    with no_waits():
        for x in batches(job.steps, dist.get_rank()):
            step(ddp, optimizer, job, x)
    return state.switched_at, state.calibrated_lr


def test_rule_switches_as_on_the_cpu(ranks: RankPool) -> None:
    job = Job(options={"nonfinite": "ignore"}, ddp=TINY_BUCKETS, record=False)
    on_cpu, on_both, on_gpu = (
        ranks.run(switch_by_a_rule, replace(job, devices=devices), world=2, timeout=TIMEOUT)
        for devices in (("cpu",), ("cpu", *GPU), GPU)
    )
    (step, learning_rate), _ = on_cpu
    assert step is not None
    for found in (on_cpu, on_both, on_gpu):
        assert found[0] == found[1] == (step, pytest.approx(learning_rate, rel=0.01))


@pytest.mark.parametrize("feature", ["plain", "rebuilt_buckets", "gradient_as_bucket_view", "static_graph", "no_sync"])
@pytest.mark.parametrize("part", ["construction", "training", "all"])
def test_on_a_side_stream(ranks: RankPool, part: str, feature: str) -> None:
    check(ranks, replace(FEATURES[feature], devices=GPU, side_stream=part), 2)


def train_on_the_second_device(job: Job) -> tuple[bytes, bool]:
    """Also whether CUDA has a context on the first."""
    torch.cuda.set_device(1)
    return train_to_bytes(job), bool(torch._C._cuda_hasPrimaryContext(0))  # type: ignore[attr-defined]


def test_uses_no_device_but_that_of_the_gradients() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    job = Job(ddp=TINY_BUCKETS, devices=("cuda:1",))
    with RankPool(2) as new_ranks:  # the others have been on the first device
        found = new_ranks.run(train_on_the_second_device, job, timeout=TIMEOUT)
    check_against_simulation(job, [pickle.loads(outcome) for outcome, _ in found])
    assert [has_context for _, has_context in found] == [False] * 2


@contextmanager
def other_work() -> Iterator[None]:
    """On other streams of this process, with memory allocated and freed all the time."""
    is_over = threading.Event()
    errors: list[Exception] = []

    def work() -> None:
        try:
            work_on()
        except Exception as error:
            errors.append(error)

    def work_on() -> None:
        streams = [torch.cuda.Stream() for _ in range(3)]  # type: ignore[no-untyped-call]
        generator = torch.Generator().manual_seed(0)
        while not is_over.is_set():
            for stream in streams:
                with torch.cuda.stream(stream):
                    size = int(torch.randint(8, 700, (), generator=generator))
                    x = torch.full((size, size), torch.nan, device=GPU[0])
                    torch.full((size,), -1, dtype=torch.int32, device=GPU[0])
                    x @ x
            streams[0].synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    if errors:
        raise errors[0]


def train_beside_other_work(job: Job) -> bytes:
    with other_work():
        return train_to_bytes(job)


@pytest.mark.parametrize("side_stream", ["none", "all"])
def test_replicas_stay_identical_beside_other_work(ranks: RankPool, side_stream: str) -> None:
    """Over 500 steps, and equal to the simulation in each of them."""
    job = Job(steps=500, ddp=TINY_BUCKETS, devices=GPU, side_stream=side_stream, delays=True)
    check(ranks, job, 2, train_beside_other_work)


def poison(job: Job) -> list[bool]:
    """Whether the gradients are NaN, step by step; rank 1's are infinite in the second."""
    ddp, _, _ = build(job)
    found = []
    for number, x in enumerate(batches(3, dist.get_rank())):
        ddp.zero_grad()
        loss = ddp(x.to(job.device())).square().mean()
        (loss * (torch.inf if (number, dist.get_rank()) == (1, 1) else 1.0)).backward()
        found.append(all(bool(p.grad.isnan().all()) for p in ddp.parameters() if p.grad is not None))
    return found


def test_nonfinite_gradients_reach_all_ranks(ranks: RankPool) -> None:
    assert ranks.run(poison, Job(devices=GPU), world=2) == [[False, True, False]] * 2


def resume(job: Job, at: int) -> tuple[str, str]:
    """Digests of a run, and of one that was saved on the way and went on with a new state."""
    digests = []
    for saved_at in (job.steps, at):
        ddp, state, _ = build(job)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
        for number, x in enumerate(batches(job.steps, dist.get_rank())):
            if number == saved_at:
                saved, weights = state.state_dict(), ddp.module.state_dict()
                assert all(momentum.device.type == "cpu" for momentum in saved["momentum"].values())
                ddp, state, _ = build(job)
                ddp.module.load_state_dict(weights)
                state.load_state_dict(saved)
                optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
            step(ddp, optimizer, job, x)
        digests.append(digest(ddp.module))
    return digests[0], digests[1]


def test_resumed_run_goes_on_bit_for_bit(ranks: RankPool) -> None:
    job = Job("rows", steps=8, devices=GPU, record=False)
    for whole, resumed in ranks.run(resume, job, 4, world=2, timeout=TIMEOUT):
        assert whole == resumed


def memory_in_steady_state(job: Job) -> tuple[int, int]:
    """How often the hook had memory of the device allocated in the last steps, and how many bytes are in use."""
    ddp, _, _ = build(job)
    x = next(batches(1, 0)).to(job.device())

    def allocations() -> int:
        return int(torch.cuda.memory_stats()["allocation.all.allocated"])

    def backward(call: Callable[[], object]) -> int:
        before = allocations()
        call()
        return allocations() - before

    for _ in range(3):
        ddp(x).sum().backward()
    with_hook = backward(lambda: ddp(x).sum().backward())
    with ddp.no_sync():
        without_hook = backward(lambda: ddp(x).sum().backward())
    return with_hook, without_hook


def test_allocates_nothing_on_the_device_after_the_second_step(ranks: RankPool) -> None:
    for with_hook, without_hook in ranks.run(memory_in_steady_state, Job(devices=GPU, record=False), world=2):
        assert with_hook <= without_hook


def stats(job: Job) -> tuple[float, ...]:
    ddp, state, _ = build(job)
    assert isinstance(state, MajorityVoteState)
    for x in batches(4, dist.get_rank()):
        ddp(x.to(job.device())).sum().backward()
    counted = state.stats()
    return counted.pack_seconds, counted.vote_seconds, counted.exchange_seconds, counted.unpack_seconds


def test_stats(ranks: RankPool) -> None:
    for seconds in ranks.run(stats, Job(devices=GPU), world=2):
        assert all(0 < part < 60 for part in seconds)


@contextmanager
def late(op: str, stream: str) -> Iterator[None]:
    """One of the codec's streams has much to do before ``op``."""
    right = getattr(CudaCodec, op)

    def begin_late(self: CudaCodec, *arguments: Any, **options: Any) -> None:
        with torch.cuda.stream(getattr(self._streams, stream)):
            torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
        right(self, *arguments, **options)

    with mock.patch.object(CudaCodec, op, begin_late):
        yield


def gradients_after_backward(job: Job, op: str, stream: str) -> list[bool]:
    """Whether the stream of whoever calls backward() finds the votes, step by step."""
    ddp, _, _ = build(job)
    found = []
    with late(op, stream):
        for x in batches(5, dist.get_rank()):
            ddp.zero_grad()
            ddp(x.to(job.device())).sum().backward()
            votes = [in_memory_order(p.grad) for p in ddp.parameters() if p.grad is not None]  # begins no wait
            found.append(all(bool((vote.abs() == 1).all()) for vote in votes))
    return found


@pytest.mark.parametrize(("op", "stream"), [("pack", "leaving"), ("unpack", "returning")])
def test_caller_finds_the_votes_however_late_a_stream_is(ranks: RankPool, op: str, stream: str) -> None:
    job = Job(ddp=TINY_BUCKETS, devices=GPU)
    assert ranks.run(gradients_after_backward, job, op, stream, world=2) == [[True] * 5] * 2


@pytest.mark.parametrize(("op", "stream"), [("pack", "leaving"), ("unpack", "returning")])
@pytest.mark.parametrize("options", ["signum", "mean_abs", "abstain_with_everything"])
def test_late_streams_equal_simulation(ranks: RankPool, options: str, op: str, stream: str) -> None:
    """On a side stream, from which the next step's gradients come."""
    job = replace(FEATURES["gradient_as_bucket_view"], options=OPTIONS[options], devices=GPU, side_stream="all")
    check(ranks, job, 2, partial(train_late, op=op, stream=stream))


def train_late(job: Job, op: str, stream: str) -> bytes:
    with late(op, stream):
        return train_to_bytes(job)
