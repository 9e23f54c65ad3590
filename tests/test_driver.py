"""Every implementation against the reference in a C++ program of its own: with sanitizers, and for aarch64 in qemu."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

import signvote
from driver import FLAGS, PLAIN, SANITIZED, UNDECIDED, Cases, need, run
from samples import DTYPES, SIZES, bit_rows, mixture, special, store

TESTS = Path(__file__).parent
CPU = TESTS.parent / "csrc" / "cpu"
NUM_ROWS = (*range(1, 10), 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000)
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"],
}

pytestmark = pytest.mark.timeout(600)  # compilers, on a machine that may be busy


def write_cases(file: BinaryIO) -> None:
    cases = Cases(file)
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        for i, numel in enumerate(SIZES):
            cases.add_pack(rng, mixture(rng, numel, dtype), dtype, UNDECIDED[i % 3])
            cases.add_pack(rng, mixture(rng, numel, dtype, finite=True), dtype, "coin")
            cases.add_unpack(rng, numel, dtype)
            for threshold in (0.0, 0.5):
                cases.add_pack_ternary(mixture(rng, numel, dtype), dtype, threshold)
                cases.add_pack_ternary(mixture(rng, numel, dtype, finite=True), dtype, threshold)
            cases.add_unpack_ternary(rng, numel, dtype)
        for threshold in (0.0, 1e-40, 1.0, 1e300, math.inf):
            cases.add_pack_ternary(np.tile(special(dtype), 30), dtype, threshold)
        for undecided in UNDECIDED:
            cases.add_pack(rng, np.tile(special(dtype), 5), dtype, undecided)
            cases.add_pack(rng, store(np.zeros(200), dtype), dtype, undecided)
            cases.add_pack(rng, store(rng.standard_normal(200), dtype), dtype, undecided)
    for num_rows in NUM_ROWS:
        small = (0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)
        for i, numel in enumerate((*small, 2085) if num_rows < 100 else (0, 1, 65, 513)):
            for bits in bit_rows(rng, num_rows, numel):
                cases.add_vote(rng, bits, UNDECIDED[i % 3])
            cases.add_vote_ternary(rng, num_rows, numel)
    for num_planes in (1, 2, 3, 5, 8, 11):
        for i, numel in enumerate(SIZES):
            cases.add_counts(rng, num_planes, numel, UNDECIDED[i % 3])
            cases.add_counts_ternary(rng, num_planes, numel)
    for num_rows in (2, 10, 33):  # more than a tile of any width
        cases.add_vote(rng, rng.integers(0, 2, (num_rows, 2 * 16384 + 77)).astype(bool), "coin")
    for num_rows in (2, 7, 21):
        cases.add_vote_ternary(rng, num_rows, 2 * 16384 + 77)
    for num_rows in range(9, 17):  # that begin at the same place of a page
        cases.add_vote(rng, rng.integers(0, 2, (num_rows, 2 * 16384 - 13)).astype(bool), "coin")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cases") / "cases"
    with path.open("wb") as file:
        write_cases(file)
    return path


def build(compiler: str, flags: list[str], implementations: list[str], directory: Path) -> Path:
    """The driver, two compilers at a time."""
    sources = [TESTS / "cpp" / "driver.cpp", CPU / "dispatch.cpp"]
    sources += [CPU / f"kernels_{name}.cpp" for name in implementations]

    def build_object(source: Path) -> str:
        built = str(directory / f"{source.stem}.o")
        isa_flags = ISA_FLAGS.get(source.stem.removeprefix("kernels_"), [])
        subprocess.run([compiler, *FLAGS, *flags, *isa_flags, "-c", str(source), "-o", built], check=True)
        return built

    with ThreadPoolExecutor(2) as executor:
        objects = list(executor.map(build_object, sources))
    driver = directory / "driver"
    subprocess.run([compiler, *flags, *objects, "-o", str(driver)], check=True)
    return driver


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the driver's guard pages are Linux's")
@pytest.mark.parametrize("flags", [PLAIN, SANITIZED], ids=["plain", "sanitized"])
def test_this_machine(flags: list[str], cases: Path, tmp_path: Path) -> None:
    need("g++")
    isas = {"x86_64": ["avx2", "avx512"], "aarch64": ["neon"]}.get(platform.machine(), [])
    driver = build("g++", flags, [*isas, "portable"], tmp_path)
    assert f"{' '.join(signvote.implementations())}: 0 wrong" in run([str(driver)], cases)


def test_aarch64_in_qemu(cases: Path, tmp_path: Path) -> None:
    need("aarch64-linux-gnu-g++", "qemu-aarch64")
    driver = build("aarch64-linux-gnu-g++", PLAIN, ["neon", "portable"], tmp_path)
    output = run(["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", str(driver)], cases)
    assert "neon portable: 0 wrong" in output
