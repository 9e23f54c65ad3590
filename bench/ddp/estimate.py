"""About how long a run will take: by the model of `signvote plan`, before anything is measured."""

from __future__ import annotations

from dataclasses import replace

import netlab
from ddp.calibration import Calibration
from ddp.methods import METHODS
from ddp.predictions import predict_one
from ddp.results import Measurement, Work
from ddp.worker import floor_seconds, schedule
from ddp.workloads import SLEEP_SECONDS, coordinates_of
from signvote.cli.bench.machine import usable_cpus
from signvote.cli.plan.model import ddp_buckets

# Seconds of a CPU, roughly: until a rank can begin, until a workload can, and for a step's computation.
START_SECONDS, NEW_SECONDS, STEP_SECONDS = 4.0, 1.5, 0.06
POWERSGD_PASSES = 3.0  # its time over links without a limit, by that of an all-reduce


def launch_seconds(workers: int, rate: str, works: list[Work], calibration: Calibration) -> float:
    crowd = max(1.0, workers / usable_cpus())
    return crowd * START_SECONDS + sum(work_seconds(work, workers, rate, crowd, calibration) for work in works)


def work_seconds(work: Work, workers: int, rate: str, crowd: float, calibration: Calibration) -> float:
    coordinates = work.coordinates or coordinates_of(work.kind)
    step = {"exchange": 0.0, "sleep": SLEEP_SECONDS}.get(work.kind, crowd * STEP_SECONDS)
    estimates = []
    for name in work.methods:
        method = METHODS[name]
        payload = 0.0 if method.result == "approximation" else method.payload([(coordinates,)], workers)
        floor = floor_seconds(payload, netlab.parse_rate(rate))
        if floor is not None and floor > work.longest:
            continue
        buckets = [coordinates] if work.kind == "exchange" else ddp_buckets(coordinates)
        one = Measurement(work.kind, coordinates, buckets, workers, rate, name, payload, payload, floor)
        if method.result == "approximation":  # it passes over all data, and sends little
            found = predict_one(replace(one, method="fp32", rate="none"), calibration, 0.0)
            assert found is not None
            estimates.append(step + POWERSGD_PASSES * found.exchange_seconds)
        else:
            found = predict_one(one, calibration, step)
            estimates.append(step if found is None else found.step_seconds)
    _, turns = schedule(estimates, work.seconds, work.rounds)
    # Once before, when results are checked.
    return crowd * NEW_SECONDS + sum((1 + turn) * one for turn, one in zip(turns, estimates, strict=True))
