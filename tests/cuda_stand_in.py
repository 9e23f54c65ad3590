"""The CUDA kernels without a GPU, and tensors where they work.

``tests/cpp/cuda_on_cpu`` stands in for CUDA: the kernels' sources are built by the host compiler, and every thread is a
fiber.
"""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from driver import FLAGS, need
from samples import BITS, DTYPES
from signvote import cuda

TESTS = Path(__file__).parent
CUDA = TESTS.parent / "csrc" / "cuda"
STAND_IN = TESTS / "cpp" / "cuda_on_cpu"
# Two blocks at most, so that they have more than one piece for each of their warps.
HOST_FLAGS = ["-Wno-unknown-pragmas", "-fno-strict-aliasing", "-DSIGNVOTE_CUDA_MAX_BLOCKS=2", "-I", str(STAND_IN)]

TILE, VOTE_PIECE = 1024, 4096
TILED_SIZES = (TILE, 2 * TILE, 5 * TILE - 1, 5 * TILE, 16 * TILE, 40 * TILE + 33)

# What has no NumPy dtype in torch crosses as integers.
AS_TENSOR: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


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


def build_module(directory: Path) -> Any:
    """``_cuda`` on the CPU: its device memory is memory, so its tensors are on the CPU."""
    need_stand_in()
    pybind11 = pytest.importorskip("pybind11")
    # An access of a vector at an address that is no multiple of its size kills the process; on a GPU it fails as well.
    flags = ["-O1", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", "-fPIC", "-fvisibility=hidden"]
    flags += ['-DSIGNVOTE_CUDA_ARCHITECTURES="none"', "-I", str(CUDA.parent)]
    flags += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    sources = [CUDA.parent / "bindings" / "cuda.cpp", *CUDA.glob("*.cu"), STAND_IN / "cuda_on_cpu.cpp"]
    built = directory / "_cuda.so"
    subprocess.run(["g++", "-shared", *build_objects(sources, flags, directory), "-o", str(built)], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use_module(module: Any, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """All of ``signvote.cuda`` but the choice of device and stream runs as on a GPU, on the device that is returned."""

    @contextmanager
    def current(device: torch.device) -> Iterator[tuple[int, Any]]:
        yield 0, SimpleNamespace(cuda_stream=0)

    monkeypatch.setattr(cuda, "find_module", lambda: module)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # what signvote goes by, in Python and in _cuda
    monkeypatch.setattr(cuda, "_current", current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return torch.device("cpu")


def to_tensor(array: NDArray[Any], device: torch.device, dtype: str | None = None, offset: int = 0) -> torch.Tensor:
    """On the device, ``offset`` items after where memory is aligned."""
    kind = array.dtype if dtype is None else np.dtype(BITS[dtype])
    integers = torch.from_numpy(array.view(kind.str.replace("u", "i")).copy().reshape(-1))
    memory = torch.zeros(array.size + offset, dtype=integers.dtype, device=device)
    memory[offset:] = integers.to(device)
    return memory[offset:] if dtype is None else memory[offset:].view(AS_TENSOR[dtype])


def to_numpy(x: torch.Tensor) -> Any:
    """Its bits."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    array = x.detach().view(integers).cpu().numpy()
    return array.view(array.dtype.str.replace("i", "u"))


def same_floats(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Equal to the last bit, all NaNs alike; ``a`` are the bits."""
    return bool(np.all((a == b.view(a.dtype)) | (np.isnan(a.view(b.dtype)) & np.isnan(b))))
