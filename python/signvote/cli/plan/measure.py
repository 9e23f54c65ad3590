"""What the codec and gloo cost on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from signvote import ops
from signvote.cli.bench.measure import Contender, no_garbage_collection, take_turns
from signvote.cli.plan.model import Codec, Host

COORDINATES = 1 << 24  # more than caches hold
SENT_COORDINATES = 1 << 22
VOTES = 1 << 24  # bits, of all workers
MOST_ROWS = 64  # a vote's cost per worker changes little beyond
SECONDS = 0.6
TIMEOUT = timedelta(seconds=10)
FEW_ROUNDS, MANY_ROUNDS = 7, 100
PAUSE = 5e-3  # seconds: as long as threads and CPUs need to go to sleep


def measure_codec(dtype: torch.dtype, momentum: float, workers: int) -> Codec:
    """The ops with torch's number of threads, all memory allocated and touched before, medians."""
    random = torch.Generator().manual_seed(0)
    gradient = torch.randn(COORDINATES, generator=random).to(dtype)
    kept = torch.zeros(COORDINATES, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    words = ops.pack_signs(gradient)
    half = gradient.to(torch.float16)
    rows = min(workers, MOST_ROWS)
    ballots = torch.randint(-(2**31), 2**31, (rows, VOTES // rows // 32), generator=random, dtype=torch.int32)
    vote = torch.empty_like(ballots[0])
    coefficients = (momentum, 1 - momentum, momentum, 1 - momentum)
    threads = torch.get_num_threads()

    def pack() -> None:
        if momentum:
            ops.pack_momentum(gradient, kept, coefficients=coefficients, out=words, num_threads=threads)
        else:
            ops.pack_signs(gradient, out=words, num_threads=threads)

    calls: dict[str, tuple[Callable[[], object], int]] = {
        "pack": (pack, COORDINATES),
        "vote": (lambda: ops.majority_vote(ballots, out=vote, num_threads=1), ballots.numel() * 32),
        # The hook unpacks on the thread that exchanges, with one CPU beside the backward pass.
        "unpack": (lambda: ops.unpack_signs(words, COORDINATES, out=gradient, num_threads=1), COORDINATES),
        # Into new memory, as the hook does it: that costs more than the cast.
        "to_half": (lambda: gradient.to(torch.float16, copy=True).div_(workers), COORDINATES),
        "from_half": (lambda: gradient.copy_(half), COORDINATES),
    }
    contenders = {name: Contender("op", name, threads, call) for name, (call, _) in calls.items()}
    with no_garbage_collection():
        take_turns(list(contenders.values()), SECONDS)
    return Codec(**{name: contenders[name].spread().median / numel for name, (_, numel) in calls.items()})


def measure_host() -> Host:
    """Collectives between two gloo ranks in this process, over whatever this host calls itself by.

    They go through the kernel's TCP but no network card, so that they are the least of what messages cost.

    Raises:
        RuntimeError: gloo finds no address of this host.
    """
    store = dist.HashStore()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as pool:
        groups: list[Any] = list(pool.map(lambda rank: dist.ProcessGroupGloo(store, rank, 2, TIMEOUT), range(2)))

    def all_reduce(numel: int, dtype: torch.dtype, rounds: int) -> float:
        tensors = [torch.zeros(numel, dtype=dtype) for _ in groups]
        return median_seconds(
            lambda: [group.allreduce([tensor]) for group, tensor in zip(groups, tensors, strict=True)], rounds
        )

    def swap(rounds: int, pause: float) -> float:
        received, sent = torch.zeros(2, 2, 4)
        return median_seconds(
            lambda: [
                *(group.recv([received[rank]], 1 - rank, 0) for rank, group in enumerate(groups)),
                *(group.send([sent[rank]], 1 - rank, 0) for rank, group in enumerate(groups)),
            ],
            rounds,
            pause,
        )

    return host_of(all_reduce, swap)


def median_seconds(begin: Callable[[], Sequence[dist.Work]], rounds: int, pause: float = 0.0) -> float:
    """Of what ``begin`` begins, with that many seconds of sleep before each."""
    times = []
    for _ in range(rounds):
        time.sleep(pause)
        start = time.perf_counter()
        for work in begin():
            work.wait(TIMEOUT)
        times.append(time.perf_counter() - start)
    return median(times)


def host_of(
    all_reduce: Callable[[int, torch.dtype, int], float],
    swap: Callable[[int, float], float],
    coordinates: int = SENT_COORDINATES,
) -> Host:
    """What messages cost, by seconds of an all-reduce and a swap between two, without a limit of the link's.

    Args:
        all_reduce: Takes the number of coordinates, their dtype and how often to do it; returns the median.
        swap: A message of a few words each way, receives first. Takes how often to do it, and the seconds of sleep
            before each; returns the median.
        coordinates: Of a large all-reduce.
    """
    # Of the ring between two: four messages, and as many bytes sent as the tensor has, the half of them added. A
    # larger tensor goes in segments of 1 MiB.
    message = all_reduce(4, torch.float32, MANY_ROUNDS) / 4
    waking = max(0.0, swap(MANY_ROUNDS, PAUSE) - swap(MANY_ROUNDS, 0.0))
    size = 4 * coordinates
    single = max(0.0, all_reduce(coordinates, torch.float32, FEW_ROUNDS) - size / 2**20 * message)
    half = max(0.0, all_reduce(coordinates, torch.float16, FEW_ROUNDS) - size / 2**21 * message)
    added = max(0.0, half - single / 2) / (coordinates / 2)
    return Host(message_seconds=message, wake_seconds=waking, byte_seconds=single / size, half_sum_seconds=added)
