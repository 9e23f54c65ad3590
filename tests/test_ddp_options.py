"""The hook's options with each other, with DDP's features, between ranks of unequal weight, and through a checkpoint.

One run on real ranks trains many small jobs: to start one costs more than to train.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from ddp_jobs import Job, Outcome, train
from ranks import RankPool
from test_ddp_training import FEATURES, OPTIONS, TINY_BUCKETS, check_against_simulation

EVERYTHING = OPTIONS["abstain_with_everything"]


def train_all(jobs: Mapping[str, Job]) -> dict[str, Outcome]:
    return {name: train(job) for name, job in jobs.items()}


def check_all(ranks: RankPool, jobs: Mapping[str, Job], world: int = 3) -> dict[str, list[Outcome]]:
    """Every job equals the simulation; returns what came of it on each rank."""
    by_rank = ranks.run(train_all, jobs, world=world)
    outcomes = {name: [outcomes[name] for outcomes in by_rank] for name in jobs}
    for name, job in jobs.items():
        try:
            check_against_simulation(job, outcomes[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return outcomes


@pytest.mark.parametrize("topology", ["allgather", "server"])
def test_options_equal_simulation_with_every_topology(ranks: RankPool, topology: str) -> None:
    check_all(
        ranks,
        {
            name: Job("rows", steps=8, options={**options, "topology": topology}, ddp=TINY_BUCKETS)
            for name, options in OPTIONS.items()
        },
    )


# -- Weights ----------------------------------------------------------------------------------------------------------

WEIGHTED: dict[str, dict[str, Any]] = {
    name: OPTIONS[name]
    for name in (
        "signum",
        "constant_bits",
        "abstain",
        "threshold",
        "relative_threshold",
        "quorum",
        "zero_ties",
        "exclude",
        "exclude_all",
        "mean_abs",
        "dense_steps",
        "abstain_with_everything",
    )
}


@pytest.mark.parametrize("topology", ["sharded", "allgather", "server"])
def test_weights_equal_simulation(ranks: RankPool, topology: str) -> None:
    """Of weights 1, 3, 2 the second ties with the others; of the greatest the last is without a say."""
    jobs = {
        f"{name} {weights}": Job(
            "rows", steps=6, options={**options, "topology": topology}, ddp=TINY_BUCKETS, weights=weights
        )
        for name, options in WEIGHTED.items()
        for weights in ((1, 3, 2),)
    }
    jobs["greatest"] = Job("rows", steps=3, options={"topology": topology}, weights=(65535, 65535, 1))
    jobs["greatest, ternary"] = Job(
        "rows", steps=3, options={"topology": topology, "abstain": True, "quorum": 0.6}, weights=(65535, 65535, 65535)
    )
    check_all(ranks, jobs)


@pytest.mark.parametrize("topology", ["sharded", "server"])
def test_equal_weights_are_no_weights(ranks: RankPool, topology: str) -> None:
    jobs = {
        f"{name} {weight}": Job(
            "rows", steps=6, options={**WEIGHTED[name], "topology": topology}, weights=(weight,), record=False
        )
        for name in ("signum", "abstain", "zero_ties", "relative_threshold", "dense_steps", "exclude")
        for weight in (1, 4)  # a mean of four times the sum is rounded as that of the sum
    }
    for outcomes in ranks.run(train_all, jobs, world=3):
        digests = [outcome.digest for outcome in outcomes.values()]
        assert digests[::2] == digests[1::2]
        assert len(set(digests)) == len(digests) // 2


# -- Features of DDP --------------------------------------------------------------------------------------------------


def test_features_with_options_equal_simulation(ranks: RankPool) -> None:
    """The topologies take turns: with each option, all of them are compared above."""
    jobs = {
        f"{feature}, everything": replace(job, options=EVERYTHING, weights=(2, 1, 3))
        for feature, job in FEATURES.items()
        if feature not in ("one_element", "channels_last")
    }
    jobs |= {
        f"join, {name}": Job("rows", uneven=True, options=OPTIONS[name], ddp=TINY_BUCKETS)
        for name in ("abstain", "abstain_lion", "relative_threshold_with_dither", "zero_ties", "mean_abs", "exclude")
    }
    jobs |= {
        "no_sync, mean_abs": Job(accumulate=3, options={"scale": "mean_abs", "exclude": ["0.weight"]}),
        "mixed, dense": Job("mixed", options={"dense_steps": 4, "exclude": ["second.*"], "scale": "mean_abs"}),
        "mixed, dither": Job("mixed", options={"dither": 0.5, "ties": "zero"}, ddp=TINY_BUCKETS),
        "mixed, lion": Job("mixed", options=OPTIONS["abstain_lion"] | {"abstain": "rms:0.2"}),
        "channels_last, weight": Job("channels_last", options=EVERYTHING | {"exclude": ["conv.weight"]}),
        "channels_last, bias": Job("channels_last", options=EVERYTHING | {"exclude": ["conv.bias"]}),
        "channels_last, dense": Job("channels_last", options={"dense_steps": 3, "momentum": 0.5}),
        "unused, abstain": Job("branches", options={"abstain": True}, ddp={"find_unused_parameters": True}),
    }
    for name in ("exclude_all", "zero_ties", "mean_abs", "dither", "agreement", "dense_steps", "relative_threshold"):
        options = {**OPTIONS[name], **({"exclude": ["*"]} if "exclude" in OPTIONS[name] else {})}
        jobs |= {f"{model}, {name}": Job(model, options=options, ddp=TINY_BUCKETS) for model in ("scalar", "empty")}
    topologies = itertools.cycle(["sharded", "allgather", "server"])
    jobs = {name: replace(job, options={**job.options, "topology": next(topologies)}) for name, job in jobs.items()}
    jobs |= {
        f"empty and weights, {name}, {topology}": Job(
            "empty", options={**options, "topology": topology}, ddp=TINY_BUCKETS, weights=(1, 3, 2)
        )
        for name, options in (("plain", {}), ("abstain", {"abstain": True}), ("exclude", {"exclude": ["before"]}))
        for topology in ("sharded", "server")
    }
    check_all(ranks, {name: replace(job, steps=8) for name, job in jobs.items()})
