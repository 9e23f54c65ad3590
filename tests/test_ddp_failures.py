"""What breaks is seen, by every rank, with a message that says where; nothing hangs and nothing is hidden."""

import os
import signal
import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import signvote.ddp.voter as voter_module
from ddp_jobs import Job, batches, build, delayed_worker, digest, mlp, step
from ranks import RankDied, RankError, RankPool
from signvote.ddp import MajorityVoteState, attach, majority_vote_hook
from signvote.ddp.cpu_codec import CpuCodec
from signvote.ddp.options import TOPOLOGIES
from signvote.optim import SignSGD

# -- Non-finite gradients ---------------------------------------------------------------------------------------------


def train_with_nonfinite(
    nonfinite: str, topology: str, value: float, bad_step: int, bad_ranks: tuple[int, ...] = (1,)
) -> dict[str, Any]:
    """`bad_ranks` meet `value` in one coordinate at `bad_step`; all train under a GradScaler."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    ddp = DistributedDataParallel(mlp(), bucket_cap_mb=1e-5)
    state = attach(ddp, nonfinite=nonfinite, topology=topology)
    optimizer = SignSGD(ddp.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10_000)
    seen, scales, moved = [], [], []
    for i, x in enumerate(batches(6, rank)):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in ddp.parameters()]
        loss = ddp(x).square().mean()
        if i == bad_step and rank in bad_ranks:
            loss = loss + value * ddp.module[2].bias[3]
        scaler.scale(loss).backward()
        seen.append(any(not p.grad.isfinite().all() for p in ddp.parameters() if p.grad is not None))
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(any(not torch.equal(b, p) for b, p in zip(before, ddp.parameters(), strict=True)))
    momentum_is_finite = all(m.isfinite().all() for m in state.state_dict()["momentum"].values())
    return {
        "seen": seen,
        "scales": scales,
        "moved": moved,
        "nonfinite": state.stats().nonfinite,
        "momentum_is_finite": bool(momentum_is_finite),
    }


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("bad_step", [0, 1, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_on_one_rank_is_seen_by_all(ranks: RankPool, topology: str, bad_step: int, value: float) -> None:
    for outcome in ranks.run(train_with_nonfinite, "propagate", topology, value, bad_step, world=3):
        bad = [i == bad_step for i in range(6)]
        assert outcome["seen"] == bad
        assert outcome["moved"] == [not b for b in bad]  # GradScaler skipped the step
        assert outcome["scales"] == [1024.0 if i < bad_step else 512.0 for i in range(6)]  # and halved its scale
        assert outcome["nonfinite"] == 1
        assert outcome["momentum_is_finite"]  # the next steps are not poisoned


def test_nonfinite_ignored(ranks: RankPool) -> None:
    for outcome in ranks.run(train_with_nonfinite, "ignore", "sharded", float("nan"), 2, world=2):
        assert outcome["seen"] == [False] * 6
        assert outcome["moved"] == [True] * 6
        assert outcome["nonfinite"] == 1


def test_nonfinite_raised_on_every_rank(ranks: RankPool) -> None:
    outcomes = ranks.outcomes(train_with_nonfinite, "raise", "sharded", float("inf"), 2, (1, 2), world=3)
    for outcome in outcomes:
        assert isinstance(outcome, RankError)
        assert "step 3, bucket 0: 2 gradient coordinates are NaN or inf, the lowest rank that has any is 1" in str(
            outcome
        )


# -- Ranks that die or stall ------------------------------------------------------------------------------------------


def tell(what: str) -> None:
    dist.distributed_c10d._get_default_store().set(f"{what} {dist.get_rank()}", "")


def wait_for_others(what: str) -> None:
    """Until all other ranks have told ``what``."""
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    dist.distributed_c10d._get_default_store().wait([f"{what} {rank}" for rank in others], timedelta(seconds=20))


def lose_a_rank(how: str, topology: str, lost: int, at_step: int) -> tuple[str, float]:
    ddp, state, _ = build(Job(options={"topology": topology, "timeout": timedelta(seconds=2)}))
    optimizer = SignSGD(ddp.parameters(), lr=0.01)
    for i, x in enumerate(batches(50, dist.get_rank()), 1):
        if i == 1:
            state.channel()  # all ranks make the group
            tell("has the group")
        if i == at_step and dist.get_rank() == lost:
            wait_for_others("has the group")
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            wait_for_others("gave up")
            return "", 0.0
        start = time.monotonic()
        try:
            step(ddp, optimizer, Job(), x)
        except RuntimeError as error:
            seconds = time.monotonic() - start
            tell("gave up")
            return str(error), seconds
    raise AssertionError("no error")


@pytest.mark.parametrize(("topology", "at_step"), [*((topology, 6) for topology in TOPOLOGIES), ("sharded", 1)])
@pytest.mark.parametrize("how", ["killed", "stalled"])
def test_a_lost_rank_is_named_and_nobody_hangs(ranks: RankPool, topology: str, how: str, at_step: int) -> None:
    lost = 2
    outcomes = ranks.outcomes(lose_a_rank, how, topology, lost, at_step, world=3)
    if how == "killed":
        assert isinstance(outcomes[lost], RankDied)
    for rank in (0, 1):
        text, seconds = outcomes[rank]
        where = f"signvote: rank {rank}, step {at_step}, bucket 0: "
        assert where in text
        exchanges = ("exchange of signs", "exchange of votes", "gather", "broadcast")
        phases = ("agreement: all_gather",) if at_step == 1 else exchanges
        assert text.split(where)[1].startswith(phases)
        assert seconds < 5


def abort_receives(topology: str) -> str:
    """gloo's wait() returns False for a message that was aborted, and does not raise."""
    aborted = mock.Mock(wait=lambda: False)
    ddp, _, _ = build(Job(options={"topology": topology, "timeout": timedelta(seconds=2)}))
    ddp(torch.ones(2, 7)).sum().backward()
    with mock.patch.object(dist.ProcessGroup, "recv", return_value=aborted):
        try:
            ddp(torch.ones(2, 7)).sum().backward()
        except RuntimeError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("topology", "name"),
    [("sharded", "exchange of signs"), ("allgather", "exchange of signs"), ("server", "gather")],
)
def test_an_aborted_message_raises(ranks: RankPool, topology: str, name: str) -> None:
    text = ranks.run(abort_receives, topology, world=2)[0]
    assert f"rank 0, step 2, bucket 0: {name}: a message was aborted" in text


def lose_a_rank_within_the_groups_timeout() -> str:
    """The state has no timeout of its own: that of `init_process_group` counts."""
    rank, world = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore("short", dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=4))
    ddp, _, _ = build(Job())
    x = torch.ones(2, 7)
    for _ in range(2):
        ddp(x).sum().backward()
    if rank == 1:
        wait_for_others("gave up")
        return ""
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 0, step 3, bucket 0: exchange of signs"):
        ddp(x).sum().backward()
    assert time.monotonic() - start < 8
    tell("gave up")
    return "raised"


def test_the_groups_timeout_counts(ranks: RankPool) -> None:
    assert ranks.run(lose_a_rank_within_the_groups_timeout, world=2) == ["raised", ""]


def fail_and_start_anew() -> str:
    """After a failure nothing of the state outlives the process group, and the next one finds it sound."""
    rank, world = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore("anew", dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    ddp = DistributedDataParallel(mlp())
    state = attach(ddp, timeout=timedelta(seconds=4))
    for i in range(3):
        if i == 2 and rank == 1:
            wait_for_others("gave up")
            break
        with pytest.raises(RuntimeError, match="rank 0, step 3") if i == 2 else nullcontext():
            ddp(torch.ones(2, 7)).sum().backward()
        if i == 2:
            tell("gave up")
    dist.destroy_process_group()
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("signvote") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)

    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    state.step = 3  # rank 1 saw one step less
    again = DistributedDataParallel(ddp.module)
    again.register_comm_hook(state, majority_vote_hook)
    for _ in range(3):
        again(torch.ones(2, 7)).sum().backward()
    return digest(again.module)


def test_a_failed_state_works_with_the_next_process_group(ranks: RankPool) -> None:
    outcomes = ranks.run(fail_and_start_anew, world=2)
    assert outcomes[0] == outcomes[1]


def raise_and_train_on() -> str:
    """Buckets of the step that raised are still on their way when the next step begins."""
    job = Job("deep", options={"nonfinite": "raise"}, ddp={"bucket_cap_mb": 1e-5}, record=False)
    ddp, state, _ = build(job)
    optimizer = SignSGD(ddp.parameters(), lr=0.01)
    saved = state.state_dict()
    with delayed_worker(torch.Generator().manual_seed(dist.get_rank())):
        for i, x in enumerate(batches(8, dist.get_rank())):
            bad = i == 4
            with pytest.raises(RuntimeError, match="are NaN or inf") if bad else nullcontext():
                optimizer.zero_grad()
                (ddp(x).square().mean() * (torch.nan if bad and dist.get_rank() == 1 else 1.0)).backward()
                optimizer.step()
        state.load_state_dict(saved)  # the step that raised comes again, with other data
        for x in batches(8, dist.get_rank(), first=8):
            step(ddp, optimizer, job, x)
    return digest(ddp.module)


def test_training_goes_on_after_nonfinite_raised(ranks: RankPool) -> None:
    digests = ranks.run(raise_and_train_on, world=3)
    assert len(set(digests)) == 1


# -- Errors in the worker thread and in buckets -----------------------------------------------------------------------


def fail_in_worker() -> list[str]:
    """The vote of rank 1 raises; the others time out waiting for it."""

    def broken(*arguments: object, **options: object) -> int:
        raise ArithmeticError("the vote broke for a test")

    ddp, _, _ = build(Job(options={"timeout": timedelta(seconds=2)}))
    texts = []
    with mock.patch.object(voter_module, "vote_runs", broken) if dist.get_rank() == 1 else nullcontext():
        for _ in range(2):
            try:
                ddp(torch.ones(2, 7)).sum().backward()
            except RuntimeError as error:
                texts.append(str(error))
    return texts


def test_an_error_in_the_worker_reaches_the_caller_of_backward(ranks: RankPool) -> None:
    texts = ranks.run(fail_in_worker, world=2)
    assert all("rank 1, step 1, bucket 0: the vote broke for a test" in text for text in texts[1])
    assert "rank 0, step 1, bucket 0: exchange of votes" in texts[0][0]
    assert len(texts[0]) == len(texts[1]) == 2  # a state that failed once stays failed: ranks may be out of step


class LostFuture(torch.futures.Future[Any]):
    """One whose callbacks are never called."""

    def set_result(self, result: object) -> None:
        raise RuntimeError("lost for a test")


def lose_a_callback() -> list[str]:
    ddp, _, _ = build(Job(options={"timeout": timedelta(seconds=5)}))
    texts = []
    with mock.patch.object(CpuCodec, "new_future", side_effect=LostFuture):
        for _ in range(2):
            try:
                ddp(torch.ones(2, 7)).sum().backward()
            except RuntimeError as error:
                texts.append(str(error))
    return texts


def test_an_error_before_the_callback_ends_the_backward_pass(ranks: RankPool) -> None:
    for rank, (first, second) in enumerate(ranks.run(lose_a_callback, world=2)):
        assert second == f"signvote: rank {rank}, step 1, bucket 0: lost for a test"
        assert second in first


def bad_gradients(kind: str) -> str:
    models: dict[str, nn.Module] = {
        "sparse": nn.EmbeddingBag(10, 3, sparse=True, mode="sum"),
        "complex": nn.Linear(3, 3, dtype=torch.complex64),
    }
    ddp = DistributedDataParallel(models[kind])
    attach(ddp)
    x = torch.zeros(2, 2, dtype=torch.int64) if kind == "sparse" else torch.ones(2, 3, dtype=torch.complex64)
    try:
        ddp(x).abs().sum().backward()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("sparse", "bucket 0: expected dense gradients, got torch.sparse_coo: set sparse=False on the embedding"),
        ("complex", "bucket 0: expected real parameters, got torch.complex64"),
    ],
)
def test_gradients_that_cannot_be_voted_on(ranks: RankPool, kind: str, text: str) -> None:
    for error in ranks.run(bad_gradients, kind, world=2):
        assert text in error


def test_python_reducer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a GradBucket, got tuple: torch\.compile with optimize_ddp"):
        majority_vote_hook(MajorityVoteState(), (torch.ones(3), torch.ones(3)))
