"""The memory that the hook holds, and the threads that it uses."""

import tracemalloc
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ranks import RankPool
from signvote.ddp import MajorityVoteState, attach
from signvote.ddp.options import TOPOLOGIES


class Large(nn.Module):
    """Two million coordinates, in two parameters of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(1_500_000)), nn.Parameter(torch.ones(500_000))

    def forward(self) -> torch.Tensor:
        return self.a.sum() + self.b.sum()


def memory_of(plan: Any) -> list[torch.Tensor]:
    held = [getattr(value, "words", value) for value in vars(plan.exchange).values()]  # of messages
    found = [value for value in held if isinstance(value, torch.Tensor)]
    if plan.voter._tally is not None:
        found.append(torch.from_numpy(plan.voter._tally.planes.view("i4")))
    return found


def buffers(state: MajorityVoteState) -> list[int]:
    """Where all memory lies that a state holds for its buckets."""
    tensors = [value for plan in state._plans for value in memory_of(plan)]
    tensors += [plan.momentum for plan in state._plans if plan.momentum is not None]
    arrays = [array for plan in state._plans for array in (plan.sent.runs, plan.voter._runs)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    return addresses + [array.ctypes.data for array in arrays]


def allocate_in_steady_state(topology: str) -> tuple[int, int, bool]:
    """Bytes of Python and NumPy at the peak of the steps after the second, new messages, and whether buffers stayed."""
    from signvote.ddp.layout import MessageLayout

    ddp = DistributedDataParallel(Large())
    state = attach(ddp, topology=topology)
    made = 0
    new_message = MessageLayout.new_message

    def counting(*arguments: Any) -> torch.Tensor:
        nonlocal made
        made += 1
        return new_message(*arguments)

    for _ in range(2):
        ddp().backward()
    before = buffers(state)
    tracemalloc.start()
    try:
        with mock.patch.object(MessageLayout, "new_message", counting):
            for _ in range(3):
                ddp().backward()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return peak, made, buffers(state) == before


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_allocates_nothing_of_the_models_size_after_the_second_step(ranks: RankPool, topology: str) -> None:
    for peak, made, stayed in ranks.run(allocate_in_steady_state, topology, world=2):
        assert stayed
        assert made == 0
        assert peak < 100_000  # the smallest buffer, a shard of one bit per coordinate, has 125,000 bytes


def threads_by_bucket() -> dict[str, list[int]]:
    """With which number of threads the hook calls each op, on two buckets one after the other."""
    from signvote import runs
    from signvote.ddp import cpu_codec, voter

    used: dict[str, list[int]] = {}

    def recording(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            used.setdefault(op.__name__, []).append(options["num_threads"])
            return op(*arguments, **options)

        return call

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        ddp = DistributedDataParallel(Large(), bucket_cap_mb=1e-5)
        attach(ddp)
        ddp().backward()
        ddp.zero_grad()
        with (
            mock.patch.object(voter, "vote_runs", recording(runs.vote_runs)),
            mock.patch.multiple(
                cpu_codec, pack_runs=recording(runs.pack_runs), unpack_runs=recording(runs.unpack_runs)
            ),
        ):
            ddp().backward()
    finally:
        torch.set_num_threads(before)
    return used


def test_beside_the_backward_pass_the_worker_is_one_thread(ranks: RankPool) -> None:
    for used in ranks.run(threads_by_bucket, world=2):
        assert used == {"pack_runs": [3, 3], "vote_runs": [1, 3], "unpack_runs": [1, 3]}


def held_memory(topology: str) -> int:
    ddp = DistributedDataParallel(Large())
    state = attach(ddp, topology=topology)
    for _ in range(2):
        ddp().backward()
    return sum(memory.nbytes for plan in state._plans for memory in memory_of(plan))


@pytest.mark.parametrize(
    ("topology", "bits"),
    [
        ("sharded", [3.0] * 3),
        ("allgather", [5.0] * 3),
        ("server", [6.0, 2.0, 2.0]),
        ("auto", [4.0] * 2),
        ("auto", [3.0] * 3),
    ],
)
def test_holds_the_memory_that_its_docstring_says(ranks: RankPool, topology: str, bits: list[float]) -> None:
    assert ranks.run(held_memory, topology, world=len(bits)) == pytest.approx(
        [2e6 * of_rank / 8 for of_rank in bits], rel=1e-3
    )
