"""From predictions to advice: which topology, up to which rate, and when not to use signvote at all."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from signvote.cli.plan.model import Codec, Compute, Host, Link, Prediction, break_even, predict
from signvote.ddp.options import TOPOLOGIES

#: What the vote must save of a step to be worth it: by the README's section "What one bit costs", it needs a quarter
#: more steps.
WORTHWHILE = 0.2

#: Where a step without exchange would have to be longer than this, it does not matter.
LONGEST_STEP = 1e6


@dataclass(frozen=True)
class Cluster:
    """What a prediction needs besides the method and the number of workers. ``compute`` is None if it is not known."""

    buckets: Sequence[int]
    element_bytes: int
    dtype: str
    link: Link
    codec: Codec
    host: Host
    compute: Compute | None

    @property
    def rivals(self) -> tuple[str, ...]:
        """What DDP can do without signvote; fp16 saves nothing on gradients of 16 bits."""
        return ("allreduce", "fp16") if self.element_bytes > 2 else ("allreduce",)

    def seconds(self, prediction: Prediction) -> float:
        """What methods are compared by: the step, or the exchange alone if the step's time is not known."""
        return prediction.exchange_seconds if self.compute is None else prediction.step_seconds

    def predict(self, method: str, workers: int, link: Link | None = None) -> Prediction:
        return predict(
            method,
            self.buckets,
            workers,
            link or self.link,
            codec=self.codec,
            element_bytes=self.element_bytes,
            host=self.host,
            compute=self.compute,
        )


@dataclass(frozen=True)
class Plan:
    """Advice for a number of workers.

    Attributes:
        predictions: By method.
        topology: That of the vote with the shortest step.
        rival: The method without signvote that has the shortest step.
        saved: The part of the rival's step that the vote saves; of its exchange alone if the step's time is not known.
        break_even: For each rival the rate in bits per second from which on it is as fast as the vote; None: none; 0:
            it is at every rate.
        worthwhile_to: The rate up to which the vote saves enough of a step; None: there is no such limit; 0: at none.
        longest_step: Computing seconds of a step up to which the vote saves enough; 0 if it never does.
    """

    workers: int
    predictions: dict[str, Prediction]
    topology: str
    rival: str
    saved: float
    break_even: dict[str, float | None]
    worthwhile_to: float | None
    longest_step: float


def advise(cluster: Cluster, workers: int) -> Plan:
    predictions = {method: cluster.predict(method, workers) for method in (*cluster.rivals, *TOPOLOGIES)}

    def best(methods: Sequence[str]) -> str:
        return min(methods, key=lambda method: cluster.seconds(predictions[method]))

    topology, rival = best(TOPOLOGIES), best(cluster.rivals)

    def at(link: Link, method: str) -> float:
        return cluster.seconds(cluster.predict(method, workers, link))

    def vote(link: Link) -> float:
        return at(link, topology)

    return Plan(
        workers=workers,
        predictions=predictions,
        topology=topology,
        rival=rival,
        saved=1 - cluster.seconds(predictions[topology]) / cluster.seconds(predictions[rival]),
        break_even={
            method: break_even(functools.partial(at, method=method), vote, cluster.link) for method in cluster.rivals
        },
        worthwhile_to=break_even(
            lambda link: (1 - WORTHWHILE) * min(at(link, method) for method in cluster.rivals), vote, cluster.link
        ),
        longest_step=_longest_step(cluster, workers),
    )


def _longest_step(cluster: Cluster, workers: int) -> float:
    def saves_enough(computing: float) -> bool:
        at = replace(cluster, compute=Compute(computing))
        rival = min(at.predict(method, workers).step_seconds for method in cluster.rivals)
        vote = min(at.predict(method, workers).step_seconds for method in TOPOLOGIES)
        return vote <= (1 - WORTHWHILE) * rival

    if not saves_enough(0.0):
        return 0.0
    low, high = 0.0, LONGEST_STEP
    if saves_enough(high):
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if saves_enough(middle) else (low, middle)
    return low
