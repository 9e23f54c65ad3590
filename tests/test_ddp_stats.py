"""What a state's statistics say, and what they cost to send."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_jobs import Job, Outcome, batches, build, digest, in_memory_order, step, train
from ranks import RankPool
from signvote.ddp import MajorityVoteState, ParameterStats, attach
from signvote.ddp.layout import TRAILER_WORDS
from signvote.ddp.options import TOPOLOGIES
from test_ddp_training import TINY_BUCKETS, parameter_names


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


@dataclass
class Watched:
    outcome: Outcome
    rates: list[dict[str, ParameterStats]]  # after each step
    sent: list[int]
    received: list[int]


def watch(job: Job) -> Watched:
    ddp, state, outcome = build(job)
    watched = Watched(outcome, [], [], [])
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    for x in batches(job.steps, dist.get_rank()):
        step(ddp, optimizer, job, x)
        trained = {name: p.grad for name, p in ddp.module.named_parameters() if p.grad is not None}
        outcome.voted.append({name: in_memory_order(gradient) for name, gradient in trained.items()})
        if job.options.get("track_agreement"):
            watched.rates.append(state.stats(per_parameter=True))
        watched.sent.append(state.stats().bytes_sent)
        watched.received.append(state.stats().bytes_received)
    outcome.stats = state.stats().as_dict()
    outcome.digest = digest(ddp.module)
    return watched


AGREEING: dict[str, dict[str, Any]] = {
    "binary": {"zeros": "positive"},
    "binary, zero ties": {"zeros": "positive", "ties": "zero"},
    "ternary": {"abstain": True},
    "ternary, quorum": {"abstain": 1e-3, "quorum": 0.5, "topology": "server"},
}


@pytest.mark.parametrize("model", ["branches", "rows", "frozen"])
@pytest.mark.parametrize("options", AGREEING)
def test_agreement_is_that_of_the_votes(ranks: RankPool, options: str, model: str) -> None:
    of_votes = {"momentum": 0.0, "track_agreement": True, "scale": 0.5, **AGREEING[options]}
    excluded = parameter_names(model)[-1]
    job = Job(
        model,
        steps=5,
        options={**of_votes, "exclude": [excluded]},
        ddp={"find_unused_parameters": model == "branches", **TINY_BUCKETS},
        weights=(1, 3, 2),
    )
    by_rank = ranks.run(watch, job, world=3)
    threshold = 1e-3 if "quorum" in of_votes else 0.0
    unseen = torch.zeros if "abstain" in of_votes else torch.ones  # the gradient of what nobody uses stays None
    without_vote, undecided, total = [0, 0, 0], 0, 0
    for i in range(job.steps):
        assert all(watched.rates == by_rank[0].rates for watched in by_rank)
        expected = {}
        for name, gradient in by_rank[0].outcome.local[i].items():
            if name == excluded:
                continue
            outcome = by_rank[0].outcome.voted[i].get(name, unseen(gradient.shape)).sign()
            agreement = margin = 0.0
            for rank, (watched, weight) in enumerate(zip(by_rank, job.weights, strict=True)):
                own = watched.outcome.local[i][name]
                if "abstain" in of_votes:
                    vote = torch.where(own.abs() > threshold, own.sign(), 0.0)
                    without_vote[rank] += int((vote == 0).sum())
                else:
                    vote = torch.where(own >= 0, 1.0, -1.0)
                    without_vote[rank] += int((own == 0).sum())
                agreement += weight * (vote == outcome).double().mean().item()
                margin += weight * (vote * outcome).double().mean().item()
            expected[name] = agreement / 6, margin / 6
            total += outcome.numel()
            undecided += int((outcome == 0).sum())
        if i + 1 < job.steps:  # known with the next vote
            found = by_rank[0].rates[i + 1]
            assert set(found) == set(expected)
            for name, rates in expected.items():
                assert (found[name].agreement, found[name].margin) == pytest.approx(rates, abs=1e-6), (i, name)
    assert by_rank[0].rates[0] == {}
    for rank, watched in enumerate(by_rank):
        assert watched.outcome.stats["zero_rate"] == without_vote[rank] / total
        if options != "binary":
            assert watched.outcome.stats["tie_rate"] == undecided / total


def test_agreement_must_be_asked_for() -> None:
    with pytest.raises(RuntimeError, match="per_parameter: expected a state with track_agreement=True"):
        MajorityVoteState().stats(per_parameter=True)
    with pytest.raises(RuntimeError, match="stats: the parameters' names are not known"):
        MajorityVoteState(track_agreement=True).stats(per_parameter=True)


@pytest.mark.parametrize("topology", ["sharded", "allgather", "server"])
@pytest.mark.parametrize(
    ("options", "up", "down", "dense"),
    [
        ({"abstain": True}, 2, 2, []),
        ({"ties": "zero"}, 1, 2, []),
        ({"quorum": 0.5}, 1, 2, []),
        ({"dense_steps": 9}, 0, 0, [350, 35, 5]),
        ({"exclude": ["rows.weight"]}, 1, 1, [350]),
    ],
    ids=str,
)
def test_traffic(ranks: RankPool, topology: str, options: dict[str, Any], up: int, down: int, dense: list[int]) -> None:
    """Planes and means in blocks of 64 coordinates, and a trailer, in each row of a message."""
    world = 3
    job = Job("rows", steps=4, options={**options, "topology": topology}, record=False)
    shards = world if topology == "sharded" else 1
    blocks = sum(-(-numel // 64) for numel in (350, 35, 5) if numel not in dense)
    of_means = 4 * 64 * -(-sum(dense) // (64 * shards))
    sent, back = (8 * planes * -(-blocks // shards) + of_means + 4 * TRAILER_WORDS for planes in (up, down))
    for rank, watched in enumerate(ranks.run(watch, job, world=world)):
        others = world - 1
        expected = {
            "sharded": (others * (sent + back),) * 2,
            "allgather": (others * sent,) * 2,
            "server": (others * back, others * sent) if rank == 0 else (sent, back),
        }[topology]
        assert (watched.sent[3] - watched.sent[1], watched.received[3] - watched.received[1]) == (
            2 * expected[0],
            2 * expected[1],
        )
