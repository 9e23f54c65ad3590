"""The cases of tests/cpp/driver.cpp: what goes in, and what comes out after the reference."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from samples import BITS, DTYPES, mixture, store, ternary_rows, values, word_rows
from signvote.arguments import threshold_bits

OPS = (
    "pack_signs",
    "pack_momentum",
    "has_nonfinite",
    "majority_vote",
    "unpack_signs",
    "add_counts",
    "decide_counts",
    "decide_counts_ternary",
    "pack_ternary",
    "majority_vote_ternary",
    "unpack_ternary",
    "add_counts_ternary",
)
UNDECIDED = ("negative", "positive", "coin")  # in the order of the enum
COEFFICIENTS = ((0.9, 0.1, 0.99, 0.01), (1.0, 1.0, 1.0, 1.0), (1e30, 1e30, 1e30, 1e30), (1e-30, -1e-30, -1e-30, 1e-30))
SEED = 2**64 - 3

FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
PLAIN = ["-O3"]
# Without optimization: nothing that the sanitizers look for is optimized away, and it compiles in a third of the time.
SANITIZED = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class Cases:
    """The file of cases, as tests/cpp/driver.cpp reads it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(
        self,
        op: str,
        numel: int,
        arrays: list[NDArray[Any]],
        dtype: str = "float32",
        undecided: str = "coin",
        num_rows: int = 0,
        coins: int = 0,
        positive: int = 0,
        limits: tuple[int, int] = (0, 0),
        counts: tuple[int, int] = (0, 0),
        coefficients: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    ) -> None:
        first = (OPS.index(op), DTYPES.index(dtype), UNDECIDED.index(undecided), numel, num_rows)
        self._file.write(struct.pack("=5q4Q2q4d", *first, coins, positive, *limits, *counts, *coefficients))
        for array in arrays:
            self._file.write(np.ascontiguousarray(array).tobytes())

    def add_pack(self, rng: np.random.Generator, x: NDArray[Any], dtype: str, undecided: str) -> None:
        first = 64 * int(rng.integers(0, 100))
        coins = (reference.mix(SEED) + first // 64) % 2**64
        words, zeros, nonfinite = reference.pack_signs(values(x, dtype), undecided, SEED, first)
        self.add("pack_signs", x.size, [x, words], dtype, undecided, coins=coins, counts=(zeros, nonfinite))
        self.add("has_nonfinite", x.size, [x], dtype, counts=(nonfinite > 0, 0))

        momentum_dtype = "float64" if dtype == "float64" else "float32"
        m = mixture(rng, x.size, momentum_dtype)
        coefficients = COEFFICIENTS[int(rng.integers(0, len(COEFFICIENTS)))]
        words, kept, zeros, nonfinite = reference.pack_momentum(
            values(x, dtype), m, coefficients, undecided, SEED, first
        )
        self.add(
            "pack_momentum",
            x.size,
            [x, m, words, kept],
            dtype,
            undecided,
            coins=coins,
            counts=(zeros, nonfinite),
            coefficients=coefficients,
        )

    def add_unpack(self, rng: np.random.Generator, numel: int, dtype: str) -> None:
        words = rng.integers(0, 2**32, (numel + 31) // 32, np.uint32)
        bits = BITS[dtype]
        positive: NDArray[Any] = store(np.array([0.0 if numel == 1 else 1.5]), dtype).view(bits)
        negative = positive ^ bits(2 ** (8 * positive.itemsize - 1))
        out = np.where(reference.bits_of(words, numel), positive, negative)
        self.add("unpack_signs", numel, [words, out], dtype, positive=int(positive[0]))

    def add_vote(self, rng: np.random.Generator, bits: NDArray[np.bool_], undecided: str) -> None:
        num_rows, numel = bits.shape
        first = 64 * int(rng.integers(0, 100))
        rows = word_rows(bits, unused=bool(rng.integers(0, 2)))
        words, tied = reference.majority_vote(rows, numel, undecided, SEED, first)
        coins = (reference.mix(SEED) + first // 64) % 2**64
        self.add("majority_vote", numel, [rows, words], "float32", undecided, num_rows, coins, counts=(tied, 0))

    def add_counts(self, rng: np.random.Generator, num_planes: int, numel: int, undecided: str) -> None:
        """What is added, and the decision, where counts lie near the limits as often as not."""
        width = (numel + 31) // 32
        largest = 2**num_planes - 1
        present = int(rng.integers(0, largest + 1))
        counts, addends = rng.integers(0, largest + 1, (2, 32 * width))
        total = counts + (addends & present) & largest
        planes = [planes_of(numbers, num_planes) for numbers in (addends, counts, total)]
        self.add("add_counts", numel, planes, num_rows=num_planes, limits=(present, 0))

        num_votes = int(rng.integers(1, largest + 1))
        counts = np.where(rng.integers(0, 2, 32 * width), num_votes // 2 + rng.integers(-1, 2, 32 * width), counts)
        counts = counts.clip(0, largest)
        first = 64 * int(rng.integers(0, 100))
        words, tied = reference.decide(counts[:numel], num_votes, undecided, SEED, first)
        self.add(
            "decide_counts",
            numel,
            [planes_of(counts, num_planes), words],
            undecided=undecided,
            num_rows=num_planes,
            coins=(reference.mix(SEED) + first // 64) % 2**64,
            limits=(num_votes, 0),
            counts=(tied, 0),
        )
        quorum = int(rng.integers(1, num_votes + 1))
        below = [2 * count - num_votes <= -quorum for count in range(largest + 2)].index(False)
        limits = below, [2 * count - num_votes >= quorum for count in range(largest + 1)].index(True)
        ternary = reference.decide_ternary(counts[:numel], num_votes, quorum)
        self.add(
            "decide_counts_ternary",
            numel,
            [planes_of(counts, num_planes), ternary],
            num_rows=num_planes,
            limits=limits,
            counts=(int(np.sum(abs(2 * counts[:numel] - num_votes) < quorum)), 0),
        )

    def add_pack_ternary(self, x: NDArray[Any], dtype: str, threshold: float) -> None:
        planes, *counts = reference.pack_ternary(values(x, dtype), threshold)
        limit = threshold_bits("pack_ternary", threshold, dtype)
        self.add("pack_ternary", x.size, [x, planes], dtype, limits=(limit, 0), counts=(counts[0], counts[1]))

    def add_unpack_ternary(self, rng: np.random.Generator, numel: int, dtype: str) -> None:
        planes = rng.integers(0, 2**32, (2, (numel + 31) // 32), np.uint32)
        bits = BITS[dtype]
        positive: NDArray[Any] = store(np.array([0.0 if numel == 1 else 1.5]), dtype).view(bits)
        negative = positive ^ bits(2 ** (8 * positive.itemsize - 1))
        ternary = reference.ternary_of(planes, numel)
        out = np.where(ternary == 0, bits(0), np.where(ternary > 0, positive, negative))
        self.add("unpack_ternary", numel, [planes, out], dtype, positive=int(positive[0]))

    def add_vote_ternary(self, rng: np.random.Generator, num_rows: int, numel: int) -> None:
        """With a quorum of one, and one that some leads reach."""
        rows = ternary_rows(rng, num_rows, numel)
        lead = np.array([reference.ternary_of(planes, numel) for planes in rows]).sum(axis=0)
        for quorum in (1, int(rng.integers(1, num_rows + 2))):
            result = np.where(abs(lead) < quorum, 0, lead)
            self.add(
                "majority_vote_ternary",
                numel,
                [rows, reference.planes_of(result)],
                num_rows=2 * num_rows,
                limits=(quorum, 0),
                counts=(int(np.sum(result == 0)), 0),
            )

    def add_counts_ternary(self, rng: np.random.Generator, num_planes: int, numel: int) -> None:
        width = (numel + 31) // 32
        largest = 2**num_planes - 1
        weight = int(rng.integers(1, 2**num_planes))
        votes = rng.integers(0, 2**32, (2, width), np.uint32)
        counts = rng.integers(0, largest + 1, 32 * width)
        total = counts + weight * (1 + reference.ternary_of(votes, 32 * width)) & largest
        planes = [planes_of(numbers, num_planes) for numbers in (counts, total)]
        self.add("add_counts_ternary", numel, [votes, *planes], num_rows=num_planes, limits=(weight, 0))


def planes_of(counts: NDArray[np.int64], num_planes: int) -> NDArray[np.uint32]:
    return word_rows((counts >> np.arange(num_planes)[:, None] & 1).astype(bool), unused=False)


def run(command: list[str], cases: Path) -> str:
    finished = subprocess.run([*command, str(cases)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-1000:] + finished.stderr[:4000]
    return finished.stdout


def need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
