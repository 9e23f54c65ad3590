"""Ranks that disagree, or are out of step: the same error on each."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import signvote.ddp.agreement as agreement
import signvote.ddp.hook as hook_module
import signvote.ddp.state as state_module
from ddp_jobs import Job, build
from ranks import RankPool
from signvote.ddp import MajorityVoteState, majority_vote_hook


def disagree(kind: str, value: Any) -> str:
    """Rank 1 differs; returns the error's text."""
    mine = dist.get_rank() == 1
    options: dict[str, Any] = {kind: value} if mine and kind not in ("numel", "wire version", "step", "switch") else {}
    state = MajorityVoteState(**options)
    if kind == "step" and mine:
        state.step = value
    if kind == "switch" and mine:
        state.switch_to_dense(value)
    model = nn.Linear(7, value if mine and kind == "numel" else 5)
    if kind == "exclude":
        state.name_parameters(model.named_parameters())
    with mock.patch.object(
        state_module, "WIRE_VERSION", value if mine and kind == "wire version" else agreement.WIRE_VERSION
    ):
        # no DDP here: it would itself refuse models of two shapes, and other hosts of hooks do not
        channel = state.channel()
        try:
            majority_vote_on(state, model)
        except RuntimeError as error:
            return str(error)
    raise AssertionError(f"no error on rank {channel.rank}")


class FakeBucket:
    """What the state asks of a GradBucket."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters: list[torch.Tensor] = list(model.parameters())

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def parameters(self) -> list[torch.Tensor]:
        return self._parameters

    def buffer(self) -> torch.Tensor:
        return torch.cat([torch.ones_like(p).view(-1) for p in self._parameters])


def majority_vote_on(state: MajorityVoteState, model: nn.Module) -> None:
    with mock.patch.object(hook_module, "_check_bucket"):
        majority_vote_hook(state, FakeBucket(model)).wait()


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("momentum", 0.5, "momentum: 0.9 on ranks 0, 2, 0.5 on rank 1"),
        ("momentum", (0.9, 0.99), "momentum: 0.9 on ranks 0, 2, [0.9, 0.99] on rank 1"),
        ("zeros", "positive", 'zeros: "coin" on ranks 0, 2, "positive" on rank 1'),
        ("ties", "negative", 'ties: "coin" on ranks 0, 2, "negative" on rank 1'),
        ("scale", 2.0, "scale: 1.0 on ranks 0, 2, 2.0 on rank 1"),
        ("topology", "allgather", 'topology: "sharded" on ranks 0, 2, "allgather" on rank 1'),
        ("topology", "auto", 'topology: "sharded" on ranks 0, 2, "auto" on rank 1'),
        ("nonfinite", "ignore", 'nonfinite: "propagate" on ranks 0, 2, "ignore" on rank 1'),
        ("seed", 5, "seed: 0 on ranks 0, 2, 5 on rank 1"),
        ("scale", "mean_abs", 'scale: 1.0 on ranks 0, 2, "mean_abs" on rank 1'),
        ("scale", torch.amp.GradScaler("cpu"), 'scale: 1.0 on ranks 0, 2, "loss scale" on rank 1'),
        ("abstain", True, "abstain: false on ranks 0, 2, true on rank 1"),
        ("abstain", "rms:0.1", 'abstain: false on ranks 0, 2, "rms:0.1" on rank 1'),
        ("abstain", np.float32(0.5), "abstain: false on ranks 0, 2, 0.5 on rank 1"),
        ("quorum", 2, "quorum: 1 on ranks 0, 2, 2 on rank 1"),
        ("warmup_steps", 3, "warmup_steps: 0 on ranks 0, 2, 3 on rank 1"),
        ("dense_steps", 2, "dense_steps: 0 on ranks 0, 2, 2 on rank 1"),
        ("dither", 0.5, "dither: 0.0 on ranks 0, 2, 0.5 on rank 1"),
        ("dither", abs, 'dither: 0.0 on ranks 0, 2, "a schedule" on rank 1'),
        ("track_agreement", True, "track_agreement: false on ranks 0, 2, true on rank 1"),
        ("exclude", "bias", 'excluded parameters of bucket 0: "" on ranks 0, 2, "1" on rank 1'),
        ("switch", 5, 'switch to means: "None at None" on ranks 0, 2, "None at 5" on rank 1'),
        ("numel", 6, "numel of bucket 0: 40 on ranks 0, 2, 48 on rank 1"),
        ("wire version", 99, "wire version: 3 on ranks 0, 2, 99 on rank 1"),
        ("step", 12, "step: 1 on ranks 0, 2, 13 on rank 1"),
    ],
)
def test_disagreement_raises_the_same_on_every_rank(ranks: RankPool, kind: str, value: Any, text: str) -> None:
    errors = ranks.run(disagree, kind, value, world=3)
    assert text in errors[0]
    assert len(set(errors)) == 1


def disagree_under_ddp() -> str:
    ddp, _, _ = build(Job(options={"seed": dist.get_rank()}))
    try:
        ddp(torch.ones(2, 7)).sum().backward()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("no error")


def test_disagreement_reaches_the_caller_of_backward(ranks: RankPool) -> None:
    for text in ranks.run(disagree_under_ddp, world=2):
        assert "ranks disagree on seed: 0 on rank 0, 1 on rank 1" in text


def out_of_step() -> str:
    """Rank 1 skips a step without the others: the same bucket of another step must not be voted on in silence."""
    ddp, state, _ = build(Job())
    for _ in range(2):  # DDP has rebuilt its buckets now, so that no agreement check comes before the next vote
        ddp(torch.ones(2, 7)).sum().backward()
    if dist.get_rank() == 1:
        state.step += 1
    try:
        ddp(torch.ones(2, 7)).sum().backward()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("no error")


def test_ranks_out_of_step_raise(ranks: RankPool) -> None:
    for rank, text in enumerate(ranks.run(out_of_step, world=3)):
        assert f"rank {rank}, step {4 if rank == 1 else 3}, bucket 0: vote: ranks are out of step" in text
