"""What the object files of the implementations export.

A helper that is compiled with and without an instruction set must not become one weak symbol: the linker would keep
either, and the one with the instruction set ends programs on CPUs without it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("kernels_*.cpp"))
ARM = {"neon"}


def flags_of(source: Path) -> list[str]:
    """The flags that CMakeLists.txt gives a source: its own, and those of all kernels."""
    cmake = (ROOT / "CMakeLists.txt").read_text()
    own = re.search(rf"SOURCE csrc/cpu/{source.name} PROPERTY COMPILE_OPTIONS([^)]*)\)", cmake)
    common = re.search(r"KERNEL_FLAGS (-[^)]*)\)", cmake)
    assert common
    return [*(own[1].split() if own else []), *common[1].split()]


def compiler_for(source: Path) -> str | None:
    arm = source.stem.removeprefix("kernels_") in ARM
    machine = platform.machine().lower()
    if arm and machine not in ("aarch64", "arm64"):
        return shutil.which("aarch64-linux-gnu-g++")
    if not arm and source.stem != "kernels_portable" and machine not in ("x86_64", "amd64"):
        return None
    return shutil.which(os.environ.get("CXX", "c++"))


def test_sources_are_all_there() -> None:
    assert [source.stem for source in SOURCES] == [
        "kernels_avx2",
        "kernels_avx512",
        "kernels_neon",
        "kernels_portable",
    ]
    assert "-mavx2" in flags_of(SOURCES[0])
    assert "-mavx512f" in flags_of(SOURCES[1])
    assert not [flag for flag in flags_of(SOURCES[3]) if flag.startswith("-m")]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_object_exports_its_table_and_nothing_weak(source: Path, tmp_path: Path) -> None:
    compiler, nm = compiler_for(source), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip(f"no compiler for {source.name}, or no nm")
    target = tmp_path / "kernels.o"
    # Without optimisation every helper is a function of its own; inlining could hide a weak one.
    flags = ["-O0" if flag == "-O3" else flag for flag in flags_of(source)]
    subprocess.run(
        [compiler, "-std=c++17", "-fPIC", *flags, "-I", ROOT / "csrc", "-c", source, "-o", target],
        check=True,
        timeout=110,
    )
    listing = subprocess.run([nm, "-C", "-g", "--defined-only", target], check=True, capture_output=True, text=True)
    symbols = [line.split(maxsplit=2)[1:] for line in listing.stdout.splitlines()]
    name = source.stem.removeprefix("kernels_").capitalize()
    assert [symbol for _, symbol in symbols] == [f"signvote::k{name}Kernels"]
    assert symbols[0][0] in "DRB"
