"""Time things in turns: A B C A B C ..., so that drift and disturbances hit all of them alike."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

# A sample takes at least this long, in as many calls as that needs: the clock and its reading are far below it.
SAMPLE_SECONDS = 1e-3
# What a call leaves in the caches can speed up the next call of the same thing if it is shorter than this. Then an
# untimed call comes before each sample, so that the caches are not those that another contender left.
WARM_SECONDS = 10e-3
MIN_ROUNDS, MAX_ROUNDS = 7, 25
# What is slower than the fastest by more than this factor takes part in fewer rounds, but in MIN_SAMPLES at least.
SLOW = 4
MIN_SAMPLES = 3


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        return cls(quantile(ordered, 0.5), quantile(ordered, 0.25), quantile(ordered, 0.75))


def quantile(ordered: Sequence[float], part: float) -> float:
    place = part * (len(ordered) - 1)
    below = math.floor(place)
    above = math.ceil(place)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def seconds_of_host(call: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - begin) * 1e-9


@dataclass
class Contender:
    """Something to be timed. ``check`` calls it once and raises if its result is wrong."""

    kind: str  # "op", "limit" or "peer"
    name: str  # of the implementation, the limit or the peer
    threads: int
    call: Callable[[], object]
    check: Callable[[], None] | None = None
    seconds: Callable[[Callable[[], object], int], float] = seconds_of_host  # of so many calls
    # Seconds of a call, by the round they were taken in.
    samples: dict[int, float] = field(default_factory=dict)
    calls: int = 1  # in each sample

    def spread(self) -> Spread:
        return Spread.of(list(self.samples.values()))

    def nearest(self, turn: int) -> float:
        """The sample taken nearest in time to that round."""
        return self.samples[min(self.samples, key=lambda other: abs(other - turn))]


def times_faster(contender: Contender, than: Contender) -> Spread:
    """How many times faster, sample by sample, each against the one taken nearest in time."""
    return Spread.of([than.nearest(turn) / seconds for turn, seconds in contender.samples.items()])


def take_turns(contenders: Sequence[Contender], seconds: float) -> None:
    """Fill ``samples`` of all contenders, in about ``seconds`` or the least number of rounds.

    With the garbage collector off: see :func:`no_garbage_collection`.
    """
    estimates = [estimate(contender) for contender in contenders]
    costs = []
    for contender, once in zip(contenders, estimates, strict=True):
        contender.calls = math.ceil(SAMPLE_SECONDS / once)
        costs.append((contender.calls + (once < WARM_SECONDS)) * once)
    slow = SLOW * min(costs)
    rounds = int(seconds / sum(min(cost, slow) for cost in costs))
    rounds = min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)
    turns = [min(rounds, max(MIN_SAMPLES, int(rounds * slow / cost))) for cost in costs]
    for turn in range(rounds):
        # Another one first in each round, so that none always follows the same one's caches.
        for k in range(len(contenders)):
            i = (k + turn) % len(contenders)
            # Evenly over the rounds.
            if (turn + 1) * turns[i] // rounds > turn * turns[i] // rounds:
                contenders[i].samples[turn] = sample(contenders[i], warm=estimates[i] < WARM_SECONDS)


def estimate(contender: Contender) -> float:
    """Seconds of a call; of a short one, which the caches speed up, of the faster of two later ones."""
    first = sample(contender, warm=False)
    if first > WARM_SECONDS:
        return first
    return max(min(sample(contender, warm=False) for _ in range(2)), 1e-7)


def sample(contender: Contender, warm: bool) -> float:
    """Seconds of a call."""
    call, calls = contender.call, contender.calls
    if warm:
        call()
    return contender.seconds(call, calls) / calls


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
