"""What a case is, and the contenders of one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from signvote.cli.bench.cases.data import spoil
from signvote.cli.bench.expected import Words, check_equal
from signvote.cli.bench.measure import Contender
from signvote.cli.bench.places import Cuda, Host, Place

SEED = 7
SCALE = 0.5
# Peers that would unpack more bits than this are left out: they take seconds, and gigabytes.
MOST_PEER_BITS = 1 << 27


@dataclass(frozen=True)
class Case:
    """One op on one size of data."""

    op: str
    megabytes: float  # of as many float32 coordinates
    dtype: str = "float32"
    zeros: str = "none"  # or "third": a third of the coordinates
    rows: int | None = None

    @property
    def numel(self) -> int:
        """Whole words, because the peers can do no other."""
        return 32 * max(1, round(self.megabytes * 1e6 / 4 / 32))

    @property
    def stored_dtype(self) -> Any:
        """NumPy's; of bfloat16, which it does not have, that of its bits."""
        return np.uint16 if self.dtype == "bfloat16" else self.dtype

    def label(self) -> str:
        what = f"M={self.rows}" if self.rows else self.dtype
        zeros = ", a third zeros" if self.zeros == "third" else ""
        return f"{self.op} {what} {self.megabytes:g} MB{zeros}"


@dataclass(frozen=True)
class Options:
    """Who takes part: implementations with their numbers of threads, and peers or not."""

    implementations: Sequence[tuple[str, int]]
    with_peers: bool = True
    device: torch.device | None = None  # a CUDA device, in place of the CPU


class Field:
    """Collects the contenders of a case.

    No function of theirs refers to it: nothing would end that cycle while the garbage collector is off.
    """

    def __init__(self, case: Case, options: Options) -> None:
        self.case, self.options = case, options
        self.place: Place = Host() if options.device is None else Cuda(options.device)
        self.contenders: list[Contender] = []

    @property
    def is_on_cpu(self) -> bool:
        return self.options.device is None

    @property
    def has_peers(self) -> bool:
        return self.options.with_peers and self.case.numel * (self.case.rows or 1) <= MOST_PEER_BITS

    def ops(self, call: Callable[..., object], check: Callable[[str], None]) -> None:
        """``call`` takes the options of an op; ``check`` is handed the label, after the call."""
        for name, threads in self.options.implementations:
            self._add("op", name, threads, self._bind(call, name, threads), check)

    def limit(self, name: str, call: Callable[[int], object]) -> None:
        for threads in sorted({threads for _, threads in self.options.implementations}):
            if not self.is_on_cpu:
                call(threads)  # copies what it works on to the device
            self._add("limit", name, threads, functools.partial(call, threads), None)

    def peer(self, name: str, call: Callable[[], object], check: Callable[[str], None]) -> None:
        if self.has_peers:
            self._add("peer", name, 1, call, check)

    def numpy(self, call: Callable[[], object], check: Callable[[str], None]) -> None:
        """The peer that works in host memory only, and does not have bfloat16."""
        if self.is_on_cpu and self.case.dtype != "bfloat16":
            self.peer("numpy", call, check)

    def done(self, size: int) -> tuple[list[Contender], int]:
        """What a builder returns, for ``size`` bytes."""
        if isinstance(self.place, Cuda):
            copy = self.place.limits.copy_of_size(size)
            self.limit("copy", lambda threads: copy())
        return self.contenders, size

    def _bind(self, call: Callable[..., object], name: str, threads: int) -> Callable[[], object]:
        how = {"implementation": name, "num_threads": threads} if self.is_on_cpu else {}
        return functools.partial(call, **how)

    def _add(
        self, kind: str, name: str, threads: int, call: Callable[[], object], check: Callable[[str], None] | None
    ) -> None:
        label, place = f"{self.case.label()}: {name}, threads {threads}", self.place
        contender = Contender(kind, name, threads, call, seconds=place.seconds)
        if check is not None:
            checked = check

            def call_and_check() -> None:
                place.bring()
                call()
                place.fetch()
                checked(label)

            contender.check = call_and_check
        self.contenders.append(contender)


def checker(out: NDArray[Any], right: NDArray[Any]) -> Callable[[str], None]:
    def check(label: str) -> None:
        check_equal(label, out, right)
        spoil(out)

    return check


def vote_checker(out: Words, check_vote: Callable[[str], None]) -> Callable[[str], None]:
    """``check_vote`` looks at parts of a large vote; the implementations must agree in all of it."""
    first: list[Words] = []

    def check(label: str) -> None:
        check_vote(label)
        if not first:
            first.append(out.copy())
        check_equal(label, out, first[0])
        spoil(out)

    return check
