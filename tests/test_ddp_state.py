"""Saving, loading, pickling, statistics, options, and a clean end."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_jobs import Job, batches, build, digest, mlp, step, train
from ddp_simulation import Simulation
from ranks import RankPool
from signvote.ddp import MajorityVoteState, attach, majority_vote_hook
from signvote.ddp.options import TOPOLOGIES
from signvote.optim import SignSGD

BUCKETS = {"bucket_cap_mb": 1e-5}


# -- Checkpoints ------------------------------------------------------------------------------------------------------


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume(job: Job) -> tuple[str, str]:
    """Digest after 20 steps, without and with a stop in the middle."""
    rank = dist.get_rank()
    ddp, state, _ = build(job)
    optimizer = SignSGD(ddp.parameters(), lr=0.01)
    for i, x in enumerate(batches(20, rank)):
        if i == 9:
            saved = through_a_file({"model": ddp.module.state_dict(), "vote": state.state_dict()})
        step(ddp, optimizer, job, x)
    straight = digest(ddp.module)

    ddp, state, _ = build(job)  # buckets as DDP first makes them, not as they were when the job stopped
    ddp.module.load_state_dict(saved["model"])
    state.load_state_dict(saved["vote"])
    optimizer = SignSGD(ddp.parameters(), lr=0.01)
    for x in batches(11, rank, first=9):
        step(ddp, optimizer, job, x)
    return straight, digest(ddp.module)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("model", ["mlp", "rows", "frozen"])
def test_resume_continues_bit_for_bit(ranks: RankPool, topology: str, model: str) -> None:
    job = Job(model, options={"topology": topology, "seed": 3}, ddp=BUCKETS, record=False)
    outcomes = ranks.run(resume, job, world=2)
    assert len({text for outcome in outcomes for text in outcome}) == 1


def channels_last_momentum() -> dict[str, torch.Tensor]:
    """What is saved has the parameter's own order of coordinates: here momentum = 0.5 times the gradient."""
    ddp, state, outcome = build(Job("channels_last", options={"momentum": 0.5}))
    ddp(torch.randn(2, 7)).square().sum().backward()
    gradient = outcome.local[0]["conv.weight"]
    weight = ddp.module.conv.weight
    expected = 0.5 * torch.empty_like(weight).copy_(gradient.as_strided(weight.size(), weight.stride()))
    assert torch.equal(state.state_dict()["momentum"]["conv.weight"], expected)
    return {}


def test_momentum_is_saved_in_the_order_of_the_parameter(ranks: RankPool) -> None:
    ranks.run(channels_last_momentum, world=1)


def refusals(directory: str) -> dict[str, str]:
    """Messages of `load_state_dict` for what it must refuse; the state is as before each time."""
    job = Job(record=False)
    ddp, state, _ = build(job)
    step(ddp, SignSGD(ddp.parameters(), lr=0.01), job, torch.ones(2, 7))
    good = state.state_dict()
    momentum = good["momentum"]
    bad: dict[str, Any] = {
        "world": {**good, "world_size": 8},
        "rank": {**good, "rank": 1 - dist.get_rank()},
        "unknown": {**good, "momentum": {**momentum, "extra": torch.ones(3)}},
        "missing": {**good, "parameters": [name for name in good["parameters"] if name != "0.bias"]},
        "none": {**good, "momentum": {}},
        "step": {**good, "step": -1},
        "tensors": {**good, "momentum": {"0.bias": [1.0]}},
        "shape": {**good, "momentum": {**momentum, "0.bias": torch.ones(3)}},
        "format": {**good, "format": 99},
        "keys": {"momentum": momentum},
    }
    texts = {}
    for kind, saved in bad.items():
        with pytest.raises(ValueError, match="load_state_dict") as info:
            state.load_state_dict(saved)
        texts[kind] = str(info.value)
        after = state.state_dict()
        assert after["step"] == good["step"]
        assert all(torch.equal(after["momentum"][name], momentum[name]) for name in momentum)

    state.load_state_dict({**bad["world"], "step": 7, "seed": 11}, reset_momentum=True)
    assert (state.step, state.options.seed, state.state_dict()["momentum"]) == (7, 11, {})
    step(ddp, SignSGD(ddp.parameters(), lr=0.01), job, torch.ones(2, 7))

    ddp, state, _ = build(Job(options={"momentum": 0.0}))
    with pytest.raises(ValueError, match=r"momentum: expected none \(momentum=0.0\), got 4 tensors"):
        state.load_state_dict(good)
    return texts


def test_checkpoints_that_do_not_fit_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    for rank, texts in enumerate(ranks.run(refusals, str(tmp_path), world=2)):
        assert "world_size: expected 2, as in this job, got 8" in texts["world"]
        assert "reset_momentum=True" in texts["world"]
        assert f"rank: expected {rank}, as in this job, got {1 - rank}" in texts["rank"]
        assert "unknown: ['extra'], missing: none" in texts["unknown"]
        assert "unknown: none, missing: ['0.bias']" in texts["missing"]
        assert "momentum: expected tensors, got none" in texts["none"]
        assert "step: expected an integer from 0 to 2**64 - 1, got -1" in texts["step"]
        assert "momentum: expected a dict of tensors" in texts["tensors"]
        assert "momentum of 0.bias: expected shape (40,), got (3,)" in texts["shape"]
        assert "format: expected 1, got 99" in texts["format"]
        assert "expected a dict with ['format', 'momentum', 'parameters', 'rank', " in texts["keys"]


def test_names_must_be_known_to_save() -> None:
    with pytest.raises(RuntimeError, match=r"state_dict: the parameters' names are not known: use attach\(ddp\)"):
        MajorityVoteState().state_dict()


def name_too_late() -> None:
    ddp, state, _ = build(Job())
    with pytest.raises(RuntimeError, match="known already"):
        state.name_parameters(ddp.module.named_parameters())
    other = MajorityVoteState()
    other.name_parameters(nn.Linear(2, 2).named_parameters())
    ddp = DistributedDataParallel(nn.Linear(7, 5))
    ddp.register_comm_hook(other, majority_vote_hook)
    with pytest.raises(RuntimeError, match="not among those that were named"):
        ddp(torch.ones(2, 7)).sum().backward()


def test_names_of_another_model_are_refused(ranks: RankPool) -> None:
    ranks.run(name_too_late, world=1)


def load_in_training() -> tuple[str, str]:
    """Back to a checkpoint without a new DDP: what is loaded counts, not what the buckets held."""
    job = Job(record=False)
    ddp, state, _ = build(job)
    optimizer = SignSGD(ddp.parameters(), lr=0.01)
    digests = []
    for x in batches(3, dist.get_rank()):
        step(ddp, optimizer, job, x)
    saved, model = through_a_file(state.state_dict()), copy.deepcopy(ddp.module.state_dict())
    for _ in range(2):
        for x in batches(5, dist.get_rank(), first=3):
            step(ddp, optimizer, job, x)
        digests.append(digest(ddp.module))
        ddp.module.load_state_dict(model)
        state.load_state_dict(saved)
    return digests[0], digests[1]


def test_a_checkpoint_is_loaded_in_training(ranks: RankPool) -> None:
    outcomes = ranks.run(load_in_training, world=2)
    assert len({text for outcome in outcomes for text in outcome}) == 1


def checkpoint_without_ignored_parameters() -> None:
    """DDP never shows what it ignores: such a checkpoint is complete all the same."""
    model = mlp()
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, ["0.weight"])  # type: ignore[no-untyped-call]
    ddp = DistributedDataParallel(model)
    state = attach(ddp)
    ddp(torch.ones(2, 7)).sum().backward()
    saved = state.state_dict()
    assert set(saved["momentum"]) == {"0.bias", "2.weight", "2.bias"}
    state.load_state_dict(saved)


def test_a_state_loads_its_own_checkpoint(ranks: RankPool) -> None:
    ranks.run(checkpoint_without_ignored_parameters, world=2)


# -- Pickling ---------------------------------------------------------------------------------------------------------


def test_a_new_state_needs_no_process_group_and_pickles() -> None:
    state = MajorityVoteState(momentum=(0.8, 0.95), ties="positive", topology="server", seed=5, scale=0.5)
    for again in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        assert again.options == state.options
        assert again.stats().calls == 0


def pickle_in_training() -> tuple[str, str]:
    job = Job(record=False)
    ddp, state, _ = build(job)
    optimizer = SignSGD(ddp.parameters(), lr=0.01)
    for x in batches(4, dist.get_rank()):
        step(ddp, optimizer, job, x)
    again = pickle.loads(pickle.dumps(state))
    model = copy.deepcopy(ddp.module)
    for x in batches(4, dist.get_rank(), first=4):
        step(ddp, optimizer, job, x)

    other, _, _ = build(job, again)
    other.module.load_state_dict(model.state_dict())
    optimizer = SignSGD(other.parameters(), lr=0.01)
    for x in batches(4, dist.get_rank(), first=4):
        step(other, optimizer, job, x)
    return digest(ddp.module), digest(other.module)


def test_a_state_pickled_in_training_goes_on(ranks: RankPool) -> None:
    outcomes = ranks.run(pickle_in_training, world=2)
    assert len({text for outcome in outcomes for text in outcome}) == 1


def pickle_in_a_subgroup() -> str | None:
    group = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        return None
    torch.manual_seed(0)
    ddp = DistributedDataParallel(mlp(), process_group=group)
    state = attach(ddp)
    ddp(torch.ones(2, 7)).sum().backward()
    again = pickle.loads(pickle.dumps(state))
    with pytest.raises(RuntimeError, match="pickled with a process group of its own"):
        again.channel()
    other = DistributedDataParallel(copy.deepcopy(ddp.module), process_group=group)
    with pytest.raises(TypeError, match="state and momentum: expected one or the other"):
        attach(other, state=again, momentum=0.5)
    assert attach(other, state=again) is again
    optimizer = SignSGD(other.parameters(), lr=0.01)
    step(other, optimizer, Job(), torch.ones(2, 7))
    assert again.step == 2
    return digest(other.module)


def test_a_pickled_state_of_a_subgroup_wants_its_group_again(ranks: RankPool) -> None:
    first, second, third = ranks.run(pickle_in_a_subgroup, world=3)
    assert first == second is not None
    assert third is None


def pickle_without_names() -> None:
    ddp = DistributedDataParallel(mlp())
    state = MajorityVoteState()
    assert pickle.loads(pickle.dumps(state)).step == 0
    ddp.register_comm_hook(state, majority_vote_hook)
    ddp(torch.ones(2, 7)).sum().backward()
    with pytest.raises(RuntimeError, match="whose parameters have no names cannot be pickled"):
        pickle.dumps(state)


def test_momentum_without_names_is_not_pickled(ranks: RankPool) -> None:
    ranks.run(pickle_without_names, world=1)


# -- Statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_stats(ranks: RankPool, topology: str) -> None:
    world, steps = 3, 4
    job = Job("rows", steps=steps, options={"topology": topology, "momentum": 0.0})
    outcomes = ranks.run(train, job, world=world)
    numel = 50 * 7 + 5 * 7 + 5
    agreement_bytes = _agreement_bytes(outcomes, topology)
    for rank, outcome in enumerate(outcomes):
        stats = outcome.stats
        assert stats["steps"] == steps
        assert stats["calls"] == steps  # one bucket
        assert stats["coordinates"] == steps * numel
        zeros = sum((g == 0).sum().item() for local in outcome.local for g in local.values())
        assert stats["zero_rate"] == zeros / (steps * numel)
        assert stats["nonfinite"] == 0
        assert stats["pack_seconds"] > 0
        assert stats["exchange_seconds"] > 0
        assert stats["unpack_seconds"] > 0
        assert (stats["vote_seconds"] > 0) == (topology != "server" or rank == 0)
        codec = stats["pack_seconds"] + stats["vote_seconds"] + stats["unpack_seconds"]
        assert stats["codec_nanoseconds_per_coordinate"] == pytest.approx(1e9 * codec / (steps * numel))
        sent, received = message_bytes(topology, [350, 35, 5], world, rank)
        assert stats["bytes_sent"] - agreement_bytes == steps * sent
        assert stats["bytes_received"] - agreement_bytes == steps * received
    assert len({outcome.stats["tie_rate"] for outcome in outcomes}) == 1


def _agreement_bytes(outcomes: list[Any], topology: str) -> int:
    """Of the one comparison of descriptions, before the first vote and (DDP rebuilds its bucket) before the second."""
    import json

    total = 0
    for step_ in (0, 1):
        description = {
            "wire version": 3,
            "world size": 3,
            **MajorityVoteState(topology=topology, momentum=0.0).options.described(),
            "step": step_,
            "phase": "vote",
            "switch to means": "None at None",
            "numel of bucket 0": 390,
            "parameters of bucket 0": 3,
            "dtype of bucket 0": "torch.float32",
            "excluded parameters of bucket 0": "",
        }
        total += 2 * (8 + len(json.dumps(description).encode()))
    return total


def message_bytes(topology: str, numels: list[int], world: int, rank: int) -> tuple[int, int]:
    """Payload sent and received per bucket and step: words padded to 64 coordinates, and 16 bytes of trailer a row."""
    blocks = sum(-(-numel // 64) for numel in numels)
    if topology == "sharded":
        row = 8 * -(-blocks // world) + 16
        return 2 * (world - 1) * row, 2 * (world - 1) * row
    row = 8 * blocks + 16
    if topology in ("allgather", "auto") or rank == 0:
        return (world - 1) * row, (world - 1) * row
    return row, row


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


def test_tie_rate_is_that_of_the_simulation(ranks: RankPool) -> None:
    job = Job("mlp", options={"momentum": 0.0, "ties": "positive"})
    outcomes = ranks.run(train, job, world=2)
    ties = total = 0
    for a, b in zip(outcomes[0].local, outcomes[1].local, strict=True):
        for name in a:
            nonzero = (a[name] != 0) & (b[name] != 0)
            ties += ((a[name] > 0) != (b[name] > 0))[nonzero].sum().item()
            total += a[name].numel()
    zeros = sum(outcome.stats["zero_rate"] * total for outcome in outcomes)
    assert abs(outcomes[0].stats["tie_rate"] * total - ties) <= zeros
    assert ties > 0


def attach_without_backward() -> int:
    ddp = DistributedDataParallel(nn.Linear(7, 5))
    state = attach(ddp)
    with ddp.no_sync():
        ddp(torch.ones(2, 7)).sum().backward()
    assert repr(state).startswith("MajorityVoteState(momentum=0.9, zeros='coin'")
    with pytest.raises(ValueError, match="expected skip_all_reduce_unused_params=False"):
        attach(DistributedDataParallel(nn.Linear(7, 5), skip_all_reduce_unused_params=True))
    with pytest.raises(TypeError, match="attach: ddp: expected a DistributedDataParallel, got Linear"):
        attach(ddp.module)
    return state.stats().calls


def test_a_hook_that_is_never_called_can_be_told(ranks: RankPool) -> None:
    assert ranks.run(attach_without_backward, world=2) == [0, 0]


# -- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("momentum", 1.0, "momentum: expected a number in"),
        ("momentum", -0.1, "momentum: expected a number in"),
        ("momentum", (0.9, 1.0), "momentum: expected a number in"),
        ("momentum", (0.9,), "momentum: expected a number in"),
        ("momentum", "high", "momentum: expected a number in"),
        ("momentum", float("nan"), "momentum: expected a number in"),
        ("zeros", "zero", "zeros: expected one of 'coin', 'positive', 'negative', got 'zero'"),
        ("ties", "never", "ties: expected one of 'coin', 'positive', 'negative', 'zero', got 'never'"),
        ("topology", "ring", "topology: expected one of 'sharded', 'allgather', 'server', 'auto', got 'ring'"),
        ("nonfinite", "hide", "nonfinite: expected one of"),
        ("scale", 0.0, "scale: expected a finite number above 0"),
        ("scale", float("inf"), "scale: expected a finite number above 0"),
        ("scale", 10**400, "scale: expected a finite number above 0"),
        ("scale", "loss scale", "scale: expected the GradScaler itself"),
        ("scale", "mean", "scale: expected a finite number above 0, 'mean_abs' or a GradScaler, got 'mean'"),
        ("abstain", -0.1, "abstain: expected a bool, a finite number above 0"),
        ("abstain", "rms:", "abstain: expected a bool, a finite number above 0"),
        ("abstain", "rms:inf", "abstain: expected a bool, a finite number above 0"),
        ("abstain", "0.1", "abstain: expected a bool, a finite number above 0"),
        ("abstain", 0, "abstain: expected a bool, a finite number above 0"),
        ("abstain", None, "abstain: expected a bool, a finite number above 0"),
        ("quorum", 0, "quorum: expected an integer from 1 to"),
        ("quorum", 0.0, "quorum: expected an integer from 1 to"),
        ("quorum", 1.5, "quorum: expected an integer from 1 to"),
        ("quorum", 2**31, "quorum: expected an integer from 1 to"),
        ("quorum", True, "quorum: expected an integer from 1 to"),
        ("warmup_steps", -1, "warmup_steps: expected an integer from 0 to 2\\*\\*64 - 1 or 'theory', got -1"),
        ("warmup_steps", "soon", "warmup_steps: expected an integer from 0"),
        ("dense_steps", 1.0, "dense_steps: expected an integer from 0"),
        ("dither", -1.0, "dither: expected a finite number from 0 on"),
        ("dither", "noise", "dither: expected a finite number from 0 on"),
        ("track_agreement", 1, "track_agreement: expected a bool, got 1"),
        ("weight", 0, "weight: expected an integer from 1 to 65535, got 0"),
        ("weight", 2**16, "weight: expected an integer from 1 to 65535"),
        ("weight", 1.0, "weight: expected an integer from 1 to 65535"),
        ("seed", -1, "seed: expected an integer from 0"),
        ("seed", 2**64, "seed: expected an integer from 0"),
        ("seed", 1.5, "seed: expected an integer from 0"),
    ],
)
def test_options_are_checked_at_once(option: str, value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MajorityVoteState(**{option: value})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"momentum": 0.0, "warmup_steps": 3}, "warmup_steps: expected 0 without momentum, got 3"),
        ({"momentum": (0.9, 0.99), "warmup_steps": "theory"}, "warmup_steps: expected a number with two momentum"),
        ({"abstain": True, "zeros": "positive"}, "zeros: expected the default with abstain, got 'positive'"),
        ({"abstain": 0.1, "ties": "negative"}, "ties: expected 'zero' or the default with abstain or a quorum"),
        ({"quorum": 2, "ties": "positive"}, "ties: expected 'zero' or the default with abstain or a quorum"),
        ({"quorum": 1.0, "ties": "positive"}, "ties: expected 'zero' or the default with abstain or a quorum"),
        (
            {"scale": torch.amp.GradScaler("cpu"), "nonfinite": "ignore"},
            "nonfinite: expected 'propagate' or 'raise' with a GradScaler",
        ),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MajorityVoteState(**options)


class Lock:
    """A schedule that cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, step: int) -> float:
        return 0.5


def test_a_schedule_is_not_copied() -> None:
    options = MajorityVoteState(dither=Lock()).options
    assert options.described()["dither"] == "a schedule"
    assert options.dither_at(1) == 0.5


def load_without_a_switch() -> None:
    job = Job(record=False)
    ddp, state, _ = build(job)
    step(ddp, SignSGD(ddp.parameters(), lr=0.01), job, torch.ones(2, 7))
    saved = state.state_dict()
    for at_step in (5, 7):
        _, again, _ = build(job)
        again.switch_to_dense(at_step)
        again.load_state_dict(saved)
        assert again.switched_at == at_step
        switched = again.state_dict()
    _, other, _ = build(job)
    other.switch_to_dense(3)
    with pytest.raises(ValueError, match="switch: expected at_step 3, as set, got 7"):
        other.load_state_dict(switched)
    _, switched_state, _ = build(job)
    switched_state.load_state_dict({**switched, "step": 9, "momentum": {}})  # of means there is no momentum


def test_a_switch_that_is_set_stays_when_a_checkpoint_has_none(ranks: RankPool) -> None:
    ranks.run(load_without_a_switch, world=1)


def test_warmup_of_the_theory() -> None:
    assert MajorityVoteState(warmup_steps="theory").options.warmup_steps == 54  # the paper's own number for 0.9
    assert MajorityVoteState(momentum=0.0, warmup_steps="theory").options.warmup_steps == 0


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        MajorityVoteState().channel()


# -- The end ----------------------------------------------------------------------------------------------------------


def worker_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("signvote")]


def outlive_the_group() -> tuple[str, str]:
    """The worker thread and the group go with the process group; the same state then works with the next one."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(mlp())
    state = attach(ddp)
    optimizer = SignSGD(ddp.parameters(), lr=0.01)
    for x in batches(3, dist.get_rank()):
        step(ddp, optimizer, Job(), x)
    assert worker_threads()
    rank, world = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore("again", dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    dist.destroy_process_group()
    deadline = time.monotonic() + 20
    while worker_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not worker_threads()
    assert state._binding._channel is not None
    assert not state._binding._channel.alive
    bytes_before = state.stats().bytes_sent

    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    again = DistributedDataParallel(ddp.module)
    again.register_comm_hook(state, majority_vote_hook)
    for x in batches(3, rank, first=3):
        step(again, optimizer, Job(), x)
    assert state.stats().bytes_sent > bytes_before
    assert state.step == 6
    return digest(again.module), str(state.stats().calls)


def test_nothing_outlives_the_process_group(ranks: RankPool) -> None:
    outcomes = ranks.run(outlive_the_group, world=2)
    straight = ranks.run(train_six, world=2)
    assert {outcome[0] for outcome in outcomes} == set(straight)


def give_up_states() -> str:
    """Neither a state that is closed nor one that is forgotten leaves its thread behind."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = SignSGD(model.parameters(), lr=0.01)
    for i, x in enumerate(batches(6, dist.get_rank())):
        ddp = DistributedDataParallel(model)
        state = attach(ddp, momentum=0.0)
        state.step = i
        step(ddp, optimizer, Job(), x)
        if i % 2:
            state.close()
            assert not worker_threads()
            state.close()
        del ddp, state
        gc.collect()
        deadline = time.monotonic() + 20
        while worker_threads():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    return digest(model)


def test_states_that_are_given_up_leave_no_thread(ranks: RankPool) -> None:
    assert len(set(ranks.run(give_up_states, world=2))) == 1


def train_six() -> str:
    ddp, _, _ = build(Job(record=False))
    optimizer = SignSGD(ddp.parameters(), lr=0.01)
    for x in batches(6, dist.get_rank()):
        step(ddp, optimizer, Job(), x)
    return digest(ddp.module)


def test_no_word_at_exit(tmp_path: Path) -> None:
    """Two ranks under torchrun end without a warning."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch, torch.distributed as dist
            from torch.nn.parallel import DistributedDataParallel
            from signvote.ddp import attach
            dist.init_process_group("gloo")
            ddp = DistributedDataParallel(torch.nn.Linear(7, 5))
            state = attach(ddp, ties="zero")  # of coins between two ranks it would warn
            for _ in range(3):
                ddp(torch.ones(2, 7)).sum().backward()
            assert state.stats().calls == 3
            dist.destroy_process_group()
            print("done", flush=True)
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2
    assert done.stderr == ""


def test_simulation_knows_places_of_frozen_parameters() -> None:
    """The simulation would agree with a hook that numbered only trainable parameters if it did so itself."""
    ones = {"b": torch.zeros(256)}
    first = Simulation(1, ["b"], momentum=0.0).vote([ones])["b"]
    second = Simulation(1, ["a", "b"], momentum=0.0).vote([ones])["b"]
    assert not torch.equal(first, second)
