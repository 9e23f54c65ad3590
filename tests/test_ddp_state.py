"""Options, and a clean end."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ddp_jobs import Job, batches, build, digest, mlp, step
from ddp_simulation import Simulation
from ranks import RankPool
from signvote.ddp import MajorityVoteState, attach, majority_vote_hook
from signvote.optim import SignSGD

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
