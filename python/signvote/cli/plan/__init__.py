"""`signvote plan`: how long a step would take on a cluster with each way to exchange gradients."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from signvote.cli.info import gloo_available
from signvote.cli.plan import report, units
from signvote.cli.plan.advise import Cluster, advise
from signvote.cli.plan.model import BUCKET_BYTES, FIRST_BUCKET_BYTES, Compute, Link, ddp_buckets

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}
MOST_WORKERS = 65536
MOST_BUCKETS = 50_000


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="predict a step's time on a cluster, for the vote and for DDP without it",
        description="Measure what packing, voting and gloo cost on this machine, and predict bytes and seconds of a "
        "step for DDP as it is, for torch's fp16_compress_hook and for the vote in each topology.",
    )
    add = parser.add_argument
    add("--params", type=units.count, required=True, metavar="N", help="parameters of the model, such as 124M")
    add(
        "--workers",
        type=workers,
        nargs="+",
        required=True,
        metavar="M",
        help=f"worker processes, each on a host of its own, 2 to {MOST_WORKERS}; several numbers: a table of them",
    )
    add("--link", type=units.rate, required=True, metavar="RATE", help="of each worker's link, such as 1gbit")
    add("--latency", type=units.seconds, default=1e-4, metavar="TIME", help="of the link, one way [100us]")
    add("--half-duplex", action="store_true", help="the link's rate is for both directions together")
    add("--step-seconds", type=units.seconds, metavar="TIME", help="a step's time on one worker, without any exchange")
    add("--dtype", choices=DTYPES, default="fp32", help="of the gradients [fp32]")
    add("--momentum", type=momentum, default=0.9, metavar="BETA", help="of the vote [0.9]")
    add(
        "--bucket-mb",
        type=megabytes,
        metavar="MB",
        help=f"DDP's bucket_cap_mb [{BUCKET_BYTES >> 20}, and {FIRST_BUCKET_BYTES >> 20} for the first bucket]",
    )
    add("--json", type=Path, metavar="PATH", help="write the figures there")
    parser.set_defaults(run=run, fail=parser.error)


def _number(kind: Callable[[str], float], text: str, low: float, high: float, expected: str) -> float:
    try:
        number = kind(text)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number


def workers(text: str) -> int:
    return int(_number(int, text, 2, MOST_WORKERS, f"an integer from 2 to {MOST_WORKERS}"))


def megabytes(text: str) -> float:
    return _number(float, text, 0.01, 1e6, "a number from 0.01 to 1000000")


def momentum(text: str) -> float:
    return _number(float, text, 0, 0.999999, "a number in [0, 1)")


def run(options: argparse.Namespace) -> int:
    # Imported here because they need gloo.
    if not gloo_available():
        print("signvote plan: there is no gloo in this torch: the hook cannot run", file=sys.stderr)
        return 1
    from signvote.cli.plan.measure import measure_codec, measure_host

    dtype = DTYPES[options.dtype]
    first_bytes, cap_bytes = FIRST_BUCKET_BYTES, BUCKET_BYTES
    if options.bucket_mb is not None:  # DDP's first bucket is no smaller then
        first_bytes = cap_bytes = round(options.bucket_mb * 2**20)
    if options.params * dtype.itemsize > MOST_BUCKETS * cap_bytes:
        options.fail(
            f"argument --params: {options.params:,} parameters make more than {MOST_BUCKETS:,} buckets of "
            f"{cap_bytes / 2**20:g} MB; expected fewer, or a larger --bucket-mb"
        )
    try:
        host = measure_host()
    except RuntimeError as error:
        print(f"signvote plan: gloo: {error}", file=sys.stderr)
        return 1
    cluster = Cluster(
        buckets=ddp_buckets(options.params, dtype.itemsize, first_bytes=first_bytes, cap_bytes=cap_bytes),
        element_bytes=dtype.itemsize,
        dtype=options.dtype,
        link=Link(options.link, options.latency, full_duplex=not options.half_duplex),
        codec=measure_codec(dtype, options.momentum, max(options.workers)),
        host=host,
        compute=None if options.step_seconds is None else Compute(options.step_seconds),
    )
    plans = [advise(cluster, number) for number in options.workers]
    print(report.header(cluster, plans))
    print(report.one(cluster, plans[0]) if len(plans) == 1 else report.several(cluster, plans))
    if options.json is not None:
        try:
            report.write_json(options.json, cluster, plans)
        except OSError as error:
            print(f"signvote plan: {error}", file=sys.stderr)
            return 1
        print(f"\nWritten: {options.json}")
    return 0
