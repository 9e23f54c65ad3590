"""What the model of `signvote plan` says of the lab, given what the codec and gloo cost there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import netlab
from ddp.calibration import Calibration
from ddp.results import Measurement
from signvote.cli.bench.machine import usable_cpus
from signvote.cli.plan.model import METHODS, Compute, Link, Prediction, predict

NAMES = {"fp32": "allreduce"}  # of the model, where they differ


def with_predictions(measurements: Sequence[Measurement], calibration: Calibration) -> list[Measurement]:
    """The same, each with the seconds that the model predicts where it can.

    Of a step the model is told what it takes without any exchange: the median of ``noop``.
    """
    floors = {place(one): one.seconds.median for one in measurements if one.method == "noop" and one.seconds}
    found = []
    for one in measurements:
        prediction = predict_one(one, calibration, floors.get(place(one)))
        if prediction is not None:
            seconds = prediction.exchange_seconds if one.workload == "exchange" else prediction.step_seconds
            one = replace(one, predicted=seconds)
        found.append(one)
    return found


def place(one: Measurement) -> tuple[str, int, int, str]:
    return one.workload, one.coordinates, one.workers, one.rate


def predict_one(one: Measurement, calibration: Calibration, step_seconds: float | None) -> Prediction | None:
    name, _, momentum = one.method.partition("/")
    method = NAMES.get(name, name)
    if method not in METHODS or (one.workload != "exchange" and step_seconds is None):
        return None
    codecs = calibration.codecs
    return predict(
        method,
        one.buckets,
        one.workers,
        link(one.rate),
        codec=codecs[float(momentum)] if momentum else next(iter(codecs.values())),
        # All workers are on this machine.
        host=replace(calibration.host, workers_per_cpu=one.workers / usable_cpus()),
        compute=None if step_seconds is None else Compute(step_seconds, on_cpu=one.workload != "sleep"),
    )


def link(rate: str) -> Link:
    """One of netlab's: without latency, and with its token bucket's burst."""
    bits_per_second = netlab.parse_rate(rate)
    if bits_per_second is None:
        return Link(math.inf, latency_seconds=0.0)
    return Link(bits_per_second, latency_seconds=0.0, burst_bytes=netlab.burst_bytes(bits_per_second))
