"""What the codec and gloo cost in the lab: ``python -m ddp.calibration RESULT.json`` is one of two ranks.

Both measure at the same time, as the ranks of an exchange pack at the same time; the slower one counts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ddp.worker import largest
from signvote.cli.plan.measure import host_of, measure_codec
from signvote.cli.plan.model import Codec, Host

WORKERS = 2  # of a calibration
VOTERS = 4  # a vote costs nearly the same for each of more
MOMENTA = (0.0, 0.9)
SENT_COORDINATES = 1 << 24  # more than caches hold, as in the largest exchanges
TIMEOUT = timedelta(seconds=60)  # of a collective


@dataclass(frozen=True)
class Calibration:
    """Of one rank on a host of its own. ``codecs`` are by the vote's momentum."""

    codecs: dict[float, Codec]
    host: Host

    def as_dict(self) -> dict[str, Any]:
        codecs = [{"momentum": momentum, **asdict(codec)} for momentum, codec in self.codecs.items()]
        return {"codecs": codecs, "host": asdict(self.host)}

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict()), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Calibration:
        document = json.loads(path.read_text(encoding="utf-8"))
        codecs = {fields.pop("momentum"): Codec(**fields) for fields in document["codecs"]}
        return cls(codecs, Host(**document["host"]))


def slowest_codec(momentum: float) -> Codec:
    dist.barrier()
    own = measure_codec(torch.float32, momentum, VOTERS)
    return Codec(*largest(own.pack, own.vote, own.unpack, own.to_half, own.from_half))


def all_reduce(numel: int, dtype: torch.dtype, rounds: int) -> float:
    tensor = torch.zeros(numel, dtype=dtype)
    times = []
    for _ in range(rounds):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - begin)
    return median(largest(*times))


def swap(rounds: int, pause: float) -> float:
    received, sent = torch.zeros(2, 4)
    other = 1 - dist.get_rank()
    messages = [dist.P2POp(dist.irecv, received, other), dist.P2POp(dist.isend, sent, other)]
    times = []
    for _ in range(rounds):
        time.sleep(pause)
        begin = time.perf_counter()
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        times.append(time.perf_counter() - begin)
    return -median(largest(*(-seconds for seconds in times)))  # of the rank that began last: it does not wait for that


def main(path: str) -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        found = Calibration(
            {momentum: slowest_codec(momentum) for momentum in MOMENTA}, host_of(all_reduce, swap, SENT_COORDINATES)
        )
        if int(os.environ["RANK"]) == 0:
            found.write(Path(path))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
