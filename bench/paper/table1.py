"""Table 1: bits per iteration of SGD, QSGD, TernGrad and majority vote, counted at the collective between gloo ranks.

python bench/paper/table1.py --out signvote-bench
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

import common
from exchanges import EXCHANGES, Wire
from signvote.ddp import attach

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORKERS = (2, 4, 8)
COORDINATES = (10_000, 100_000, 1_000_000)
SEED = 0
TIMEOUT = 100.0  # seconds, for all ranks together
#: Options of the hook.
VOTES: dict[str, dict[str, Any]] = {
    "majority vote": {"topology": "server"},
    "majority vote, sharded": {"topology": "sharded"},
    "majority vote, allgather": {"topology": "allgather"},
    "with abstention, sharded": {"topology": "sharded", "abstain": True},
}


def log_levels(workers: int) -> float:
    return 2.0 + math.log2(2 * workers + 1)


#: Table 1's bits per iteration by Md; for the last three, which it has not, what they must send.
FORMULAS: dict[str, tuple[str, Callable[[int], float]]] = {
    "SGD": ("64 Md", lambda workers: 64.0),
    "QSGD": ("(2 + log2(2M + 1)) Md", log_levels),
    "TernGrad": ("(2 + log2(2M + 1)) Md", log_levels),
    "majority vote": ("2 Md", lambda workers: 2.0),
    "majority vote, sharded": ("2 Md (not in the table)", lambda workers: 2.0),
    "majority vote, allgather": ("M Md (not in the table)", lambda workers: float(workers)),
    "with abstention, sharded": ("4 Md (section 6)", lambda workers: 4.0),
}


@dataclass(frozen=True)
class Count:
    """The bits that all ranks together sent in one iteration, and the share of coordinates that were not sent as 0."""

    method: str
    workers: int
    coordinates: int
    bits: int
    nonzero: float

    @property
    def per_worker(self) -> float:
        """By coordinate and worker; rank 0, as the server or as a worker, sends nothing to itself."""
        return self.bits / ((self.workers - 1) * self.coordinates)


def run(quick: bool) -> common.Result:
    workers, sizes = ((2,), (10_000,)) if quick else (WORKERS, COORDINATES)
    counts = measure(workers, sizes)
    return common.Result(
        "table1",
        "Table 1: bits per iteration",
        report(counts, workers, sizes),
        figure(counts, sizes[-1], workers),
        {
            "seed": SEED,
            "counts": [vars(count) | {"bits_per_worker_and_coordinate": count.per_worker} for count in counts],
            "formulas": {method: formula for method, (formula, _) in FORMULAS.items()},
        },
    )


def measure(workers: Sequence[int], sizes: Sequence[int]) -> list[Count]:
    """Start the ranks, and return what they counted.

    Raises:
        RuntimeError: A rank failed.
        TimeoutError: They took too long.
    """
    with tempfile.TemporaryDirectory(prefix="table1-") as folder:
        ranks = start_processes(  # type: ignore[no-untyped-call]
            work, (folder, workers, sizes), nprocs=max(workers), join=False, start_method="spawn"
        )
        deadline = time.monotonic() + TIMEOUT
        while not ranks.join(timeout=1.0):
            if time.monotonic() > deadline:
                for process in ranks.processes:
                    process.kill()
                raise TimeoutError(f"table1: the ranks are not done after {TIMEOUT:g} s")
        return [Count(**count) for count in json.loads(Path(folder, "counts.json").read_text(encoding="utf-8"))]


def work(rank: int, folder: str, workers: Sequence[int], sizes: Sequence[int]) -> None:
    """One rank: it counts with every method, size and number of workers that has a place for it."""
    torch.set_num_threads(1)
    counts = []
    for size in workers:
        if rank >= size:
            continue
        store = f"file://{folder}/store-{size}"
        timeout = timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
        try:
            counts += [count(method, numel) for numel in sizes for method in FORMULAS]
        finally:
            dist.destroy_process_group()
    if rank == 0:
        Path(folder, "counts.json").write_text(json.dumps([vars(one) for one in counts]), encoding="utf-8")


def count(method: str, numel: int) -> Count:
    """One iteration, whose result is checked."""
    generator = torch.Generator().manual_seed(SEED + dist.get_rank())
    gradient = torch.randn(numel, generator=generator)
    if method in EXCHANGES:
        wire = Wire()
        exchange = EXCHANGES[method](wire, gradient, generator)
        result, contribution, sent = exchange.result, exchange.contribution, wire.bytes_sent
        expected = sum_of(contribution) / dist.get_world_size()
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    else:
        result, sent = vote(VOTES[method], gradient)
        contribution = gradient.sign()
        lead = sum_of(contribution)
        if not torch.equal(result[lead != 0], lead.sign()[lead != 0]):
            raise AssertionError(f"{method}: the result is not the majority")
    total = sum_of(torch.tensor([sent]))
    nonzero = sum_of((contribution != 0).double().mean().reshape(1)) / dist.get_world_size()
    return Count(method, dist.get_world_size(), numel, 8 * int(total), float(nonzero))


def sum_of(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


class Fixed(nn.Module):
    """A model whose gradient is given."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numel))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).sum()


def vote(options: dict[str, Any], gradient: Tensor) -> tuple[Tensor, int]:
    """What the hook makes of `gradient`, and the bytes that it counted in one iteration.

    It is the second one: in the first the ranks also compare their options.
    """
    ddp = DistributedDataParallel(Fixed(gradient.numel()))
    state = attach(ddp, momentum=0.0, **options)
    before = 0
    for _ in range(2):
        before = state.stats().bytes_sent
        ddp.zero_grad()
        ddp(gradient).backward()
    voted = ddp.module.weight.grad
    sent = state.stats().bytes_sent - before
    return voted, sent


def report(counts: Sequence[Count], workers: Sequence[int], sizes: Sequence[int]) -> str:
    found = {(one.method, one.workers, one.coordinates): one for one in counts}
    most = max(workers)
    largest = sizes[-1]
    worst = {
        method: max(found[method, size, largest].per_worker / formula(size) for size in workers)
        for method, (_, formula) in FORMULAS.items()
    }
    ternary = [found[method, most, largest] for method in ("QSGD", "TernGrad")]
    ratios = [
        found[method, most, largest].per_worker / found["majority vote", most, largest].per_worker
        for method in ("SGD", "QSGD")
    ]
    return "\n\n".join(
        [
            "The formulas count a parameter server: what all M workers send to it and what it sends to all of them, in "
            "bits, for d coordinates. Here M gloo ranks exchange one gradient of normal numbers, and the payload that "
            "each rank hands to the collectives is counted: the vote's by the hook (`state.stats()`, trailers "
            "included, the comparison of options in the first step left out), the others' by a wrapper around send "
            "and receive. Rank 0 is a worker and the server and sends nothing to itself, so that M - 1 workers' bits "
            "are on the wire: the table shows them by (M - 1)d, beside the formula by Md. A ring all-reduce sends as "
            "much in all as SGD's server, and a sharded vote as much as the vote's. Every result was checked: against "
            "the mean of what the ranks gave, or against the majority.",
            common.table(
                ["", "Table 1", *(f"M = {size}: formula, measured" for size in workers)],
                [
                    [
                        method,
                        text,
                        *(f"{formula(size):.3f}, {found[method, size, largest].per_worker:.3f}" for size in workers),
                    ]
                    for method, (text, formula) in FORMULAS.items()
                ],
            ),
            f"That is for d = {largest:,}. With fewer coordinates, what does not grow with them counts for more; M = "
            f"{most}:",
            common.table(
                ["", *(f"d = {numel:,}" for numel in sizes)],
                [[method, *(f"{found[method, most, numel].per_worker:.3f}" for numel in sizes)] for method in FORMULAS],
            ),
            f"At d = {largest:,} the measured bits are at most "
            + ", ".join(f"{ratio:.3f} ({method})" for method, ratio in worst.items())
            + " times the formula's. QSGD's and TernGrad's sums are digits, base 2M + 1, of 64-bit numbers: what is "
            "left over of a number, and the scale on which the workers agree, is what they are above it. With "
            f"{most} workers SGD sends {ratios[0]:.1f} and QSGD {ratios[1]:.2f} times as many bits as the vote. The "
            "formulas give every coordinate two bits upwards, however few are not 0: of normal numbers "
            + " and ".join(f"{one.method} sent {100 * one.nonzero:.2g} %" for one in ternary)
            + " as something else than 0, so that an ideal code would need "
            + " and ".join(f"{entropy(one.nonzero):.3f}" for one in ternary)
            + " bits instead of 2; a sign that is as often + as - has no code shorter than its bit.",
        ]
    )


def entropy(nonzero: float) -> float:
    """Bits of one coordinate that is 0 or, with this probability, + or - with equal chances."""
    if not 0.0 < nonzero < 1.0:
        return nonzero
    return nonzero - nonzero * math.log2(nonzero) - (1.0 - nonzero) * math.log2(1.0 - nonzero)


def figure(counts: Sequence[Count], numel: int, workers: Sequence[int]) -> Figure:
    """Bits by coordinate, of all workers, over M: dots measured, lines by the formula, at M - 1 workers' bits."""
    found = common.new_figure(8.0, 4.0)
    axes = found.subplots()
    for method, (_, formula) in FORMULAS.items():
        lines = axes.plot(workers, [(size - 1) * formula(size) for size in workers], linewidth=1.0)
        own = [one for one in counts if one.method == method and one.coordinates == numel]
        marker = "x" if method in ("TernGrad", "majority vote, sharded") else "o"
        places = [one.workers for one in own], [one.bits / numel for one in own]
        axes.plot(*places, marker, color=lines[0].get_color(), label=method, fillstyle="none")
    axes.set(xlabel="workers M", ylabel="bits per coordinate and iteration, all ranks", xscale="log", yscale="log")
    axes.set_xticks(workers, [str(size) for size in workers])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3, which="both")
    title = "dots: measured\nlines: formula, with M - 1"
    axes.legend(title=title, title_fontsize="small", fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return found


if __name__ == "__main__":
    sys.exit(common.main(run, __doc__))
