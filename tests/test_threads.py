"""The ops on several threads: the bits and counts of one thread, and nothing left behind that could do harm."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from samples import DTYPES, STORED, mixture
from signvote import _core

SIGNUM = (0.9, 1 - 0.9, 0.9, 1 - 0.9)
SEED = 2**64 - 3

# A thread gets no less than 1 MiB and takes ranges of multiples of 16384 coordinates, so these have 2 to 8 threads,
# and ends in a range, in a word, and between them.
SIZES = (16384 * 40, 16384 * 128, 16384 * 128 + 64, 16384 * 130 - 1, 2_345_678)

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

Call = Callable[[int], tuple[Any, ...]]


def same_on_any_number_of_threads(call: Call) -> None:
    """``call(num_threads)`` returns counts and the arrays that it wrote."""
    expected = call(1)
    for num_threads in (2, 3, 8):
        for found, wanted in zip(call(num_threads), expected, strict=True):
            assert np.array_equal(found, wanted), num_threads


def bits_of(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", SIZES)
def test_packing(numel: int, dtype: str, implementation: str) -> None:
    stored = mixture(np.random.default_rng(numel), numel, dtype)
    start = np.random.default_rng(1).standard_normal(numel).astype(np.float64 if dtype == "float64" else np.float32)

    def pack_signs(num_threads: int) -> tuple[Any, ...]:
        out = np.empty((numel + 31) // 32, np.uint32)
        return *_core.pack_signs(stored, dtype, "coin", SEED, out, implementation, num_threads), out

    def pack_momentum(num_threads: int) -> tuple[Any, ...]:
        out, momentum = np.empty((numel + 31) // 32, np.uint32), start.copy()
        counts = _core.pack_momentum(stored, dtype, momentum, SIGNUM, "coin", SEED, out, implementation, num_threads)
        return *counts, out, bits_of(momentum)

    same_on_any_number_of_threads(pack_signs)
    same_on_any_number_of_threads(pack_momentum)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", SIZES)
def test_unpacking(numel: int, dtype: str, implementation: str) -> None:
    words = np.random.default_rng(numel).integers(0, 2**32, (numel + 31) // 32, np.uint32)

    def unpack_signs(num_threads: int) -> tuple[Any, ...]:
        out: NDArray[Any] = np.empty(numel, STORED[dtype])
        _core.unpack_signs(words, numel, dtype, 0x3C00, out, implementation, num_threads)
        return (bits_of(out),)

    same_on_any_number_of_threads(unpack_signs)


@pytest.mark.parametrize("num_rows", [2, 5, 64])
@pytest.mark.parametrize("numel", SIZES)
def test_voting(numel: int, num_rows: int, implementation: str) -> None:
    numel *= max(1, 40 // num_rows)
    width = (numel + 31) // 32
    rows = np.random.default_rng(numel).integers(0, 2**32, (num_rows, width), np.uint32)

    def majority_vote(num_threads: int) -> tuple[Any, ...]:
        out = np.empty(width, np.uint32)
        return _core.majority_vote(rows, numel, "coin", SEED, out, implementation, num_threads), out

    same_on_any_number_of_threads(majority_vote)


@pytest.mark.parametrize("where", [0, 16383, 16384, 1_000_000, 2_345_677])
def test_has_nonfinite(where: int, implementation: str) -> None:
    x = np.ones(2_345_678, np.float32)
    for num_threads in (1, 2, 3, 8):
        assert _core.has_nonfinite(x, "float32", implementation, num_threads) is False
    x[where] = np.nan
    for num_threads in (1, 2, 3, 8):
        assert _core.has_nonfinite(x, "float32", implementation, num_threads) is True


@pytest.mark.parametrize("sizes", [(0, 900_000, 1, 0, 64, 300_001, 63, 800_000), (700,) * 3000, (1_200_000, 0, 0)])
def test_runs(sizes: tuple[int, ...], implementation: str) -> None:
    """Parameters in the order of the bucket, with gaps between their words."""
    rng = np.random.default_rng(sum(sizes))
    table, coordinate, word = [], 0, 0
    for place, numel in enumerate(sizes):
        first = 64 * int(rng.integers(0, 100))
        table.append((place, first, numel, coordinate, word))
        coordinate, word = coordinate + numel, word + (numel + 63) // 64 * 2 + int(rng.integers(0, 2))
    runs = np.array(table, np.int64)
    bucket = mixture(rng, coordinate, "float32")
    start = rng.standard_normal(coordinate).astype(np.float32)
    rows = rng.integers(0, 2**32, (64, word), np.uint32)

    def pack_runs(num_threads: int) -> tuple[Any, ...]:
        out = np.zeros(word, np.uint32)
        counts = _core.pack_runs(bucket, "float32", None, SIGNUM, runs, "coin", SEED, out, implementation, num_threads)
        return *counts, out

    def pack_runs_momentum(num_threads: int) -> tuple[Any, ...]:
        out, momentum = np.zeros(word, np.uint32), start.copy()
        counts = _core.pack_runs(
            bucket, "float32", momentum, SIGNUM, runs, "coin", SEED, out, implementation, num_threads
        )
        return *counts, out, bits_of(momentum)

    def vote_runs(num_threads: int) -> tuple[Any, ...]:
        out = np.zeros(word, np.uint32)
        return _core.vote_runs(rows, runs, "coin", SEED, out, implementation, num_threads), out

    def unpack_runs(num_threads: int) -> tuple[Any, ...]:
        out = np.zeros(coordinate, np.float32)
        _core.unpack_runs(rows[0], runs, "float32", 0x3F800000, out, implementation, num_threads)
        return (bits_of(out),)

    for call in (pack_runs, pack_runs_momentum, vote_runs, unpack_runs):
        same_on_any_number_of_threads(call)


def test_many_callers_at_once() -> None:
    numel = 1_500_000
    arrays = [mixture(np.random.default_rng(i), numel, "float32") for i in range(6)]

    def pack(i: int, num_threads: int) -> tuple[int, int, bytes]:
        out = np.empty((numel + 31) // 32, np.uint32)
        implementation = _core.implementations()[0]
        counts = _core.pack_signs(arrays[i], "float32", "coin", i, out, implementation, num_threads)
        return *counts, out.tobytes()

    expected = [pack(i, 1) for i in range(6)]
    with ThreadPoolExecutor(6) as executor:
        found = list(executor.map(lambda call: pack(call % 6, 2 + call % 3), range(120)))
    assert found == expected * 20


def test_default_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import signvote

    asked: list[object] = []
    pack = _core.pack_signs

    def recording(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return pack(*arguments)

    monkeypatch.setattr(_core, "pack_signs", recording)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 3)
    try:
        signvote.pack_signs(torch.ones(10))
        signvote.pack_signs(torch.ones(10), num_threads=2)
    finally:
        torch.set_num_threads(before)
    assert asked == [before + 3, 2]


PRELUDE = """
import os, sys, threading, time
import numpy as np
import torch
from signvote import _core

x = np.random.default_rng(0).standard_normal(2_000_000, dtype=np.float32)
x[::7] = 0

def pack(num_threads, numel=x.size):
    out = np.empty((numel + 31) // 32, np.uint32)
    counts = _core.pack_signs(x[:numel], "float32", "coin", 7, out, _core.implementations()[0], num_threads)
    return counts, out.tobytes()

def num_threads():
    return len(os.listdir("/proc/self/task"))

def openmp():
    with open("/proc/self/maps") as maps:
        files = {line.split()[-1] for line in maps if "/" in line}
    return {os.path.basename(file) for file in files if "omp" in os.path.basename(file)}

expected = pack(1)
before = num_threads()
"""


def run(script: str) -> None:
    """In a process of its own, which has no helpers at first."""
    command = [sys.executable, "-W", "ignore", "-c", PRELUDE + textwrap.dedent(script)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr


@needs_linux
def test_helpers_are_started_when_wanted_and_then_sleep() -> None:
    run("""
        assert pack(3, numel=100_000)[0] is not None and num_threads() == before  # too small
        for _ in range(3):
            assert pack(3) == expected
            assert num_threads() == before + 2
        assert pack(2) == expected
        assert num_threads() == before + 2
        time.sleep(0.05)
        start = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - start < 0.05
    """)


@needs_linux
def test_a_child_of_fork_has_helpers_of_its_own() -> None:
    run("""
        assert pack(3) == expected
        child = os.fork()
        if child == 0:
            assert num_threads() == 1
            assert pack(3) == expected
            os._exit(0 if num_threads() == 3 else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert pack(3) == expected
    """)


@needs_linux
def test_fork_while_another_thread_works() -> None:
    run("""
        stop = False
        def work():
            while not stop:
                assert pack(2) == expected
        worker = threading.Thread(target=work)
        worker.start()
        children = []
        for _ in range(20):
            time.sleep(0.002)
            child = os.fork()
            if child == 0:
                os._exit(0 if pack(3) == expected else 1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 20
        stop = True
        worker.join()
    """)


@needs_linux
def test_without_threads_to_be_had_the_caller_does_it_all() -> None:
    run("""
        import resource
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**22, used + 2**22))  # less than the stack of a thread
        threading.stack_size(0)
        assert pack(3) == expected
        assert num_threads() == before
    """)


@needs_linux
def test_brings_no_openmp() -> None:
    run("""
        loaded = openmp()
        pack(2)
        assert openmp() == loaded
        code = "import sys, importlib.util as u; s = u.spec_from_file_location('signvote._core', sys.argv[1]);"
        code += "m = u.module_from_spec(s); s.loader.exec_module(m);"
        code += "assert 'omp' not in open('/proc/self/maps').read(), 'OpenMP'"
        os.execv(sys.executable, [sys.executable, "-c", code, _core.__file__])
    """)
