"""The CUDA kernels without a GPU: the same sources, built by the host compiler, every thread a fiber.

``tests/cpp/cuda_on_cpu`` stands in for CUDA. Here the kernels run in the C++ program that tests the CPU's, with
sanitizers, buffers that end at guard pages, and a hostile floating-point environment.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from driver import FLAGS, SANITIZED, UNDECIDED, Cases, need, run
from samples import DTYPES, SIZES, bit_rows, mixture, special, store

TESTS = Path(__file__).parent
CUDA = TESTS.parent / "csrc" / "cuda"
STAND_IN = TESTS / "cpp" / "cuda_on_cpu"
# Two blocks at most, so that they have more than one piece for each of their warps.
HOST_FLAGS = ["-Wno-unknown-pragmas", "-fno-strict-aliasing", "-DSIGNVOTE_CUDA_MAX_BLOCKS=2", "-I", str(STAND_IN)]

TILE, VOTE_PIECE = 1024, 4096
TILED_SIZES = (TILE, 2 * TILE, 5 * TILE - 1, 5 * TILE, 16 * TILE, 40 * TILE + 33)
NUM_ROWS = (*range(1, 18), 23, 24, 25, 63, 64, 255, 256, 1000)

pytestmark = pytest.mark.timeout(600)  # compilers, on a machine that may be busy


def need_stand_in() -> None:
    """For tests that are skipped where the stand-in cannot be built."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        pytest.skip("the stand-in for CUDA is written for Linux on x86-64")
    need("g++")


def build_objects(sources: list[Path], flags: list[str], directory: Path) -> list[str]:
    """Two compilers at a time."""

    def build_object(source: Path) -> str:
        built = str(directory / f"{source.name}.o")
        subprocess.run(["g++", *FLAGS, *HOST_FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", built], check=True)
        return built

    with ThreadPoolExecutor(2) as executor:
        return list(executor.map(build_object, sources))


def write_cases(cases: Cases) -> None:
    rng = np.random.default_rng(1)
    for dtype in DTYPES:
        for i, numel in enumerate((*SIZES, *TILED_SIZES)):
            cases.add_pack(rng, mixture(rng, numel, dtype), dtype, UNDECIDED[i % 3])
            cases.add_pack(rng, mixture(rng, numel, dtype, finite=True), dtype, "coin")
            cases.add_unpack(rng, numel, dtype)
        for undecided in UNDECIDED:
            cases.add_pack(rng, np.resize(special(dtype), 2 * TILE + 200), dtype, undecided)
            cases.add_pack(rng, store(np.zeros(TILE + 200), dtype), dtype, undecided)
            cases.add_pack(rng, store(rng.standard_normal(TILE + 200), dtype), dtype, undecided)
    for num_rows in NUM_ROWS:
        for i, numel in enumerate((0, 1, 31, 32, 33, 64, 65, 1023, 1025, 2 * VOTE_PIECE)):
            for bits in bit_rows(rng, num_rows, numel if num_rows < 100 else min(numel, 70)):
                cases.add_vote(rng, bits, UNDECIDED[i % 3])
    for num_rows in (2, 10, 33):
        for numel in (VOTE_PIECE - 1, VOTE_PIECE, 40 * VOTE_PIECE, 3 * VOTE_PIECE + 128, 3 * VOTE_PIECE + 77):
            cases.add_vote(rng, rng.integers(0, 2, (num_rows, numel)).astype(bool), "coin")


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
