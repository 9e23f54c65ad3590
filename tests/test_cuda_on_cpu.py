"""The CUDA kernels on the stand-in for CUDA, in the C++ program that tests the CPU's.

With sanitizers, buffers that end at guard pages, and a hostile floating-point environment.
"""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cuda_stand_in import CUDA, STAND_IN, TESTS, TILE, TILED_SIZES, VOTE_PIECE, build_objects, need_stand_in
from driver import SANITIZED, UNDECIDED, Cases, run
from samples import DTYPES, SIZES, bit_rows, mixture, special, store

NUM_ROWS = (*range(1, 18), 23, 24, 25, 63, 64, 127, 128, 255, 256, 1000)

pytestmark = pytest.mark.timeout(600)  # compilers, on a machine that may be busy


def write_cases(cases: Cases) -> None:
    rng = np.random.default_rng(1)
    for dtype in DTYPES:
        for i, numel in enumerate((*SIZES, *TILED_SIZES)):
            cases.add_pack(rng, mixture(rng, numel, dtype), dtype, UNDECIDED[i % 3])
            cases.add_pack(rng, mixture(rng, numel, dtype, finite=True), dtype, "coin")
            cases.add_unpack(rng, numel, dtype)
            cases.add_pack_ternary(mixture(rng, numel, dtype), dtype, (0.0, 0.5, 1e-40)[i % 3])
            cases.add_pack_ternary(mixture(rng, numel, dtype, finite=True), dtype, 0.5)
            cases.add_unpack_ternary(rng, numel, dtype)
        for threshold in (0.0, 1e-40, 1.0, 1e300, math.inf):
            cases.add_pack_ternary(np.resize(special(dtype), 2 * TILE + 200), dtype, threshold)
        for undecided in UNDECIDED:
            cases.add_pack(rng, np.resize(special(dtype), 2 * TILE + 200), dtype, undecided)
            cases.add_pack(rng, store(np.zeros(TILE + 200), dtype), dtype, undecided)
            cases.add_pack(rng, store(rng.standard_normal(TILE + 200), dtype), dtype, undecided)
    for num_rows in NUM_ROWS:
        for i, numel in enumerate((0, 1, 31, 32, 33, 64, 65, 1023, 1025, 2 * VOTE_PIECE)):
            for bits in bit_rows(rng, num_rows, numel if num_rows < 100 else min(numel, 70)):
                cases.add_vote(rng, bits, UNDECIDED[i % 3])
            cases.add_vote_ternary(rng, num_rows, numel if num_rows < 100 else min(numel, 70))
    for num_rows in (2, 10, 33):
        for numel in (VOTE_PIECE - 1, VOTE_PIECE, 40 * VOTE_PIECE, 3 * VOTE_PIECE + 128, 3 * VOTE_PIECE + 77):
            cases.add_vote(rng, rng.integers(0, 2, (num_rows, numel)).astype(bool), "coin")
            cases.add_vote_ternary(rng, num_rows, numel)


def test_kernels(tmp_path: Path) -> None:
    need_stand_in()
    sources = [*CUDA.glob("*.cu"), *STAND_IN.glob("*.cpp"), TESTS / "cpp" / "driver.cpp"]
    driver = tmp_path / "driver"
    # The last -O counts. All threads of a block run in turn.
    flags = [*SANITIZED, "-O1"]
    subprocess.run(["g++", *flags, *build_objects(sources, flags, tmp_path), "-o", str(driver)], check=True)
    path = tmp_path / "cases"
    with path.open("wb") as file:
        write_cases(Cases(file))
    assert "cuda: 0 wrong" in run([str(driver)], path)
