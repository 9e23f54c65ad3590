"""Training goes on from a checkpoint, and from a pickled state, bit for bit."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_jobs import Job, batches, build, digest, mlp, step
from ranks import RankPool
from signvote.ddp import MajorityVoteState, attach, majority_vote_hook
from signvote.ddp.options import TOPOLOGIES
from signvote.optim import SignSGD
from test_ddp_options import EVERYTHING
from test_ddp_training import TINY_BUCKETS, schedule

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
    job = Job(model, options={"topology": topology, "seed": 3}, ddp=TINY_BUCKETS, record=False)
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


def is_bias(name: str, parameter: torch.Tensor) -> bool:
    return name.endswith("bias")


# Training stops after step 9.
RESUMED: dict[str, dict[str, Any]] = {
    "warmup": {"warmup_steps": 12},
    "warmup of lion": {"momentum": (0.5, 0.99), "warmup_steps": 12},
    "dense steps": {"dense_steps": 12, "warmup_steps": 15},
    "dither": {"dither": schedule, "seed": 5},
    "exclude": {"exclude": ["*.bias"]},
    "exclude by function": {"exclude": is_bias},
    "abstain": {"abstain": "rms:0.2", "quorum": 2},
    "ties": {"ties": "zero", "topology": "server"},
    "everything": {**EVERYTHING, "dense_steps": 8, "warmup_steps": 12},
    "momentum of nothing": {"exclude": ["*"]},
}


def resume_all(jobs: dict[str, Job]) -> dict[str, tuple[str, str, str]]:
    return {name: (*resume(job), pickle_and_go_on(job)) for name, job in jobs.items()}


def pickle_and_go_on(job: Job) -> str:
    """Digest after 20 steps, with a stop in the middle in which the state is pickled, twice."""
    ddp, state, _ = build(job)
    optimizer = SignSGD(ddp.parameters(), lr=0.01)
    for x in batches(9, dist.get_rank()):
        step(ddp, optimizer, job, x)
    model, weight = copy.deepcopy(ddp.module.state_dict()), state.weight
    state = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(state))))
    assert state.weight == weight
    ddp, state, _ = build(job, state)
    ddp.module.load_state_dict(model)
    optimizer = SignSGD(ddp.parameters(), lr=0.01)
    for x in batches(11, dist.get_rank(), first=9):
        step(ddp, optimizer, job, x)
    return digest(ddp.module)


def test_each_option_is_resumed_bit_for_bit(ranks: RankPool) -> None:
    jobs = {
        name: Job("rows", options=options, ddp=TINY_BUCKETS, record=False, weights=(3, 1))
        for name, options in RESUMED.items()
    }
    by_rank = ranks.run(resume_all, jobs, world=2)
    for name in jobs:
        assert len({text for digests in by_rank for text in digests[name]}) == 1, name
    assert len({digests["dither"] for digests in by_rank} | {digests["abstain"] for digests in by_rank}) == 2


def load_own_checkpoint(exclude: list[str], at_step: int | None) -> None:
    """A state whose parameters have no momentum so far, though it is one with momentum."""
    job = Job("frozen", options={"exclude": exclude}, record=False)
    ddp, state, _ = build(job)
    if at_step is not None:
        state.switch_to_dense(at_step)
    step(ddp, SignSGD(ddp.parameters(), lr=0.01), job, torch.ones(2, 7))
    state.load_state_dict(state.state_dict())
    assert state.step == 1


@pytest.mark.parametrize(("exclude", "at_step"), [(["body.bias", "head.*"], None), ([], 1)])
def test_a_state_without_momentum_so_far_loads_its_own_checkpoint(
    ranks: RankPool, exclude: list[str], at_step: int | None
) -> None:
    ranks.run(load_own_checkpoint, exclude, at_step, world=1)


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
