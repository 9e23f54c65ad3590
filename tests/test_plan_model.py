"""The model behind `signvote plan`: its bytes are those really sent, and its times behave as times must."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from ranks import RankPool
from signvote.cli.plan.model import (
    METHODS,
    Codec,
    Compute,
    Host,
    Link,
    break_even,
    crowded_from,
    ddp_buckets,
    predict,
    row_bytes,
)
from signvote.ddp import attach
from signvote.ddp.layout import TRAILER_WORDS, BucketLayout, MessageLayout
from signvote.ddp.options import TOPOLOGIES
from signvote.ddp.topology import chosen

CODEC = Codec(pack=0.4e-9, vote=4e-12, unpack=0.2e-9, to_half=0.2e-9, from_half=0.2e-9)
GIGABIT = Link(1e9)

methods = st.sampled_from(METHODS)
topologies = st.sampled_from(TOPOLOGIES)
worlds = st.integers(2, 1024)
numels = st.integers(1, 10**9)
links = st.builds(
    Link,
    bits_per_second=st.floats(1e5, 1e12),
    latency_seconds=st.floats(0, 1e-2),
    full_duplex=st.booleans(),
    burst_bytes=st.sampled_from([0.0, 1e4]),
)
hosts = st.builds(
    Host,
    message_seconds=st.floats(1e-6, 1e-3),
    wake_seconds=st.floats(0, 1e-3),
    byte_seconds=st.floats(0, 1e-8),
    workers_per_cpu=st.floats(0, 8),
)
computes = st.builds(Compute, seconds=st.floats(0, 10), on_cpu=st.booleans())


@given(numel=numels, shards=worlds)
def test_row_is_that_of_the_layout(numel: int, shards: int) -> None:
    layout = MessageLayout(BucketLayout([numel], [0], shards))
    assert row_bytes(numel, shards) == 4 * layout.row_words


@given(numels=st.lists(st.integers(1, 10**6), min_size=1, max_size=20), shards=st.integers(1, 64))
def test_parameters_add_at_most_their_padding(numels: list[int], shards: int) -> None:
    row = 4 * MessageLayout(BucketLayout(numels, list(range(len(numels))), shards)).row_words
    assert 0 <= row - row_bytes(sum(numels), shards) <= 8 * len(numels)


def _votes(topology: str, numel: int) -> tuple[int, int]:
    """Bytes that a rank sends and receives in a step, agreement left out."""
    ddp = DistributedDataParallel(torch.nn.Linear(numel, 1, bias=False))
    state = attach(ddp, topology=topology)
    seen = []
    for _ in range(3):
        torch.autograd.backward(ddp(torch.ones(1, numel)).sum())
        seen.append(state.stats())
    return seen[2].bytes_sent - seen[1].bytes_sent, seen[2].bytes_received - seen[1].bytes_received


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("world", [3, 4])
def test_bytes_are_those_of_the_hook(ranks: RankPool, topology: str, world: int) -> None:
    numel = 10_001
    of_rank = ranks.run(_votes, topology, numel, world=world)
    found = predict(topology, [numel], world, GIGABIT, codec=CODEC)
    assert (found.bytes_sent, found.bytes_received) == of_rank[0]
    assert sum(sent for sent, _ in of_rank) == sum(received for _, received in of_rank)


@given(workers=worlds, numel=st.integers(10**6, 10**9))
def test_sharded_bytes_are_two_bits_a_coordinate(workers: int, numel: int) -> None:
    least = 2 * (workers - 1) / workers * numel / 8
    found = predict("sharded", [numel], workers, GIGABIT, codec=CODEC).bytes_sent
    assert least <= found <= least + 2 * (workers - 1) * (8 + 4 * TRAILER_WORDS)


@given(workers=worlds, numel=st.integers(10**4, 10**9), element_bytes=st.sampled_from([2, 4, 8]))
def test_all_reduce_sends_two_parts_of_m(workers: int, numel: int, element_bytes: int) -> None:
    found = predict("allreduce", [numel], workers, GIGABIT, codec=CODEC, element_bytes=element_bytes)
    assert found.bytes_sent == pytest.approx(2 * (workers - 1) / workers * numel * element_bytes, abs=1)
    assert found.messages >= 4 * (workers - 1)  # at least two segments in each of 2 (M - 1) rounds
    assert found.messages % (2 * (workers - 1)) == 0
    half = predict("fp16", [numel], workers, GIGABIT, codec=CODEC, element_bytes=element_bytes)
    assert half.bytes_sent == pytest.approx(2 * (workers - 1) / workers * numel * 2, abs=1)


@given(method=methods, numel=numels, workers=worlds, link=links, host=hosts, compute=computes, faster=st.floats(1, 1e3))
def test_a_faster_link_never_takes_longer(
    method: str, numel: int, workers: int, link: Link, host: Host, compute: Compute, faster: float
) -> None:
    buckets = ddp_buckets(min(numel, 10**8))
    slow = predict(method, buckets, workers, link, codec=CODEC, host=host, compute=compute)
    link = replace(link, bits_per_second=faster * link.bits_per_second)
    fast = predict(method, buckets, workers, link, codec=CODEC, host=host, compute=compute)
    assert fast.exchange_seconds <= slow.exchange_seconds * (1 + 1e-9)
    assert fast.step_seconds <= slow.step_seconds * (1 + 1e-9)
    assert fast.bytes_sent == slow.bytes_sent


# Where "auto" goes from one topology to the other, it sends less.
@given(method=methods.filter(lambda m: m != "auto"), numel=numels, more=numels, workers=worlds, link=links, host=hosts)
def test_more_coordinates_never_take_less(
    method: str, numel: int, more: int, workers: int, link: Link, host: Host
) -> None:
    few = predict(method, [numel], workers, link, codec=CODEC, host=host)
    many = predict(method, [numel + more], workers, link, codec=CODEC, host=host)
    assert many.exchange_seconds >= few.exchange_seconds * (1 - 1e-9)
    assert many.bytes_sent >= few.bytes_sent
    assert many.messages >= few.messages


@given(method=methods, numel=st.integers(1, 10**8), workers=worlds, link=links, host=hosts, compute=computes)
def test_overlap_saves_no_more_than_there_is(
    method: str, numel: int, workers: int, link: Link, host: Host, compute: Compute
) -> None:
    found = predict(method, ddp_buckets(numel), workers, link, codec=CODEC, host=host, compute=compute)
    assert found.serial_seconds == pytest.approx(compute.seconds + found.exchange_seconds)
    least = max(compute.seconds, found.exchange_seconds - found.codec_seconds)
    assert least * (1 - 1e-9) <= found.step_seconds
    if not compute.on_cpu:
        assert found.step_seconds <= found.serial_seconds * (1 + 1e-9)
    assert 0 <= found.codec_seconds <= found.exchange_seconds * (1 + 1e-9)


def test_pipeline_by_hand() -> None:
    """Three buckets of a second of the backward pass each, and exchanges of half a second: the last sticks out."""
    link = Link(1e9, latency_seconds=0.0, efficiency=1.0)
    free = Codec(0.0, 0.0, 0.0, 0.0, 0.0)
    host = Host(message_seconds=0.0, wake_seconds=0.0, byte_seconds=0.0)
    numel = 15_625_000  # 62.5 MB: half a second for two workers, who send as much as that in all
    compute = Compute(4.0, backward_share=0.75)
    found = predict("allreduce", [numel] * 3, 2, link, codec=free, host=host, compute=compute)
    assert found.exchange_seconds == pytest.approx(1.5)
    assert found.step_seconds == pytest.approx(4.5)
    slow = predict("allreduce", [4 * numel] * 3, 2, link, codec=free, host=host, compute=compute)
    assert slow.step_seconds == pytest.approx(1 + 1 + 3 * 2)


def test_half_duplex_takes_twice_as_long_where_both_directions_are_in_use() -> None:
    free = Codec(0.0, 0.0, 0.0, 0.0, 0.0)
    host = Host(message_seconds=0.0, wake_seconds=0.0, byte_seconds=0.0)
    link = Link(1e9, latency_seconds=0.0)
    for method, times in (("allreduce", 2.0), ("allgather", 2.0), ("server", 1.0)):
        full = predict(method, [10**7], 4, link, codec=free, host=host).exchange_seconds
        half = predict(method, [10**7], 4, replace(link, full_duplex=False), codec=free, host=host).exchange_seconds
        assert half == pytest.approx(times * full)


@pytest.mark.parametrize(("workers", "messages"), [(2, 1), (3, 2), (4, 3), (5, 4), (8, 6), (1024, 55)])
def test_broadcast_takes_the_slowest_branch_of_the_tree(workers: int, messages: int) -> None:
    """Rank 0 of 8 sends to 1, 2 and 4 at once, then 1 to 3 and 5, then 3 to 7."""
    free = Codec(0.0, 0.0, 0.0, 0.0, 0.0)
    host = Host(message_seconds=1.0, wake_seconds=0.0, byte_seconds=0.0, workers_per_cpu=0.0)
    found = predict("server", [64], workers, Link(1e15, latency_seconds=0.0), codec=free, host=host)
    assert found.exchange_seconds == pytest.approx(workers - 1 + messages)


@pytest.mark.parametrize(
    ("method", "pauses"), [("allreduce", 1), ("fp16", 1), ("sharded", 2), ("allgather", 1), ("server", 2)]
)
def test_a_pause_comes_before_each_phase(method: str, pauses: int) -> None:
    """Between the two halves of a ring there is none."""
    awake = Host(wake_seconds=0.0, workers_per_cpu=2.0)
    sleepy = replace(awake, wake_seconds=0.25)
    of_both = [predict(method, [64], 4, GIGABIT, codec=CODEC, host=host).exchange_seconds for host in (awake, sleepy)]
    together = 1 + awake.cpu_share  # two workers on a CPU wake up one after the other
    expected = 0.25 * pauses * (1 if method == "server" else together)
    assert of_both[1] - of_both[0] == pytest.approx(expected)


@given(
    rival=st.sampled_from(["allreduce", "fp16"]),
    topology=topologies,
    numel=st.integers(10**5, 10**8),
    workers=st.integers(2, 64),
    host=hosts,
)
def test_at_break_even_both_take_as_long(rival: str, topology: str, numel: int, workers: int, host: Host) -> None:
    slow_codec = replace(CODEC, pack=50e-9, unpack=50e-9)  # so that there is one

    def seconds(method: str, link: Link) -> float:
        return predict(method, [numel], workers, link, codec=slow_codec, host=host).exchange_seconds

    def lead(link: Link) -> float:
        return seconds(rival, link) - seconds(topology, link)

    rate = break_even(lambda link: seconds(rival, link), lambda link: seconds(topology, link), GIGABIT)
    if rate is None:
        assert lead(replace(GIGABIT, bits_per_second=1e15)) > 0
    elif rate > 1.1e3:
        here = replace(GIGABIT, bits_per_second=rate)
        assert seconds(rival, here) == pytest.approx(seconds(topology, here), rel=1e-6)


def test_messages_are_crowded_where_the_host_takes_over() -> None:
    host = Host(message_seconds=1e-4, byte_seconds=1e-10)
    workers = crowded_from(6_553_600, GIGABIT, host)
    shard = 6_553_600 / workers / 8
    assert GIGABIT.seconds(shard) == pytest.approx(host.message_seconds + host.byte_seconds * shard)


@given(numel=numels, workers=worlds)
def test_auto_is_that_of_the_hook(numel: int, workers: int) -> None:
    found = predict("auto", [numel], workers, GIGABIT, codec=CODEC)
    assert found == replace(
        predict(chosen("auto", numel, workers), [numel], workers, GIGABIT, codec=CODEC), method="auto"
    )


@given(numel=st.integers(1, 10**10), element_bytes=st.sampled_from([2, 4, 8]))
def test_buckets_hold_all_coordinates(numel: int, element_bytes: int) -> None:
    buckets = ddp_buckets(numel, element_bytes)
    assert sum(buckets) == numel
    assert min(buckets) >= 1
    assert buckets[0] * element_bytes <= 2**20
    assert max(buckets) * element_bytes <= 25 * 2**20


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"predict: method: expected one of allreduce, fp16, sharded, .*, got 'ring'"):
        predict("ring", [64], 2, GIGABIT, codec=CODEC)
