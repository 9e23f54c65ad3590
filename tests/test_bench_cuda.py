"""`signvote bench --device cuda`: what it refuses and, with a CPU in place of the device, what it checks and shows.

What it measures on a GPU is for a machine with one.
"""

from __future__ import annotations

import importlib
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from signvote import cuda, ops
from signvote.cli import bench, main
from signvote.cli.bench import bars, measure, peers, places, results
from signvote.cli.bench.cases import DTYPES, OPS, Case, Data, Options, contenders
from signvote.cli.bench.measure import Spread
from test_bench import some_result

ARRAY_OPS = ("pack_signs", "pack_momentum", "unpack_signs", "pack_ternary", "unpack_ternary")
VOTES = ("majority_vote", "majority_vote_ternary")
SMALL = ["--device", "cuda", "--size", "0.01", "--rows", "3", "8"]
machine: Any = importlib.import_module("signvote.cli.bench.machine")  # a function of its name hides it


@pytest.fixture
def cpu_as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-5)
    monkeypatch.setattr(bench, "cuda_to_measure", lambda options: torch.device("cpu"))
    monkeypatch.setattr(bench, "cuda_device", lambda device: {"name": "a CPU"})
    monkeypatch.setattr(places.Cuda, "seconds", places.Host.seconds)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)


@pytest.mark.usefixtures("cpu_as_device")
def test_run_on_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "name a CPU\n" in printed
    assert "The hook copies 0.0313 of a bucket's float32 bytes to the host, and as many back." in printed
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]
    facts, measured = results.read(tmp_path / "bench.json")
    assert facts["device"] == "cuda"
    assert {(r.op, r.dtype, r.zeros, r.rows) for r in measured} == {
        *((op, dtype, "none", None) for op in ARRAY_OPS for dtype in DTYPES),
        *(("pack_signs", dtype, "third", None) for dtype in DTYPES),
        *((op, "float32", "none", rows) for op in VOTES for rows in (3, 8)),
        ("round_trip", "float32", "none", None),
    }
    assert {r.name for r in measured if r.kind == "op"} == {"cuda"}
    limits = {(r.op, r.name) for r in measured if r.kind == "limit"}
    assert limits == {
        *((op, "copy") for op in (*ARRAY_OPS, *VOTES)),
        *((op, "read") for op in ("pack_signs", "pack_ternary")),
        ("pack_momentum", "update"),
        *((op, "write") for op in ("unpack_signs", "unpack_ternary")),
        *((op, "read_rows_then_write") for op in VOTES),
        ("round_trip", "transfer"),
    }
    peers = {(r.op, r.name) for r in measured if r.kind == "peer"}
    assert {(op, "torch") for op in (*ARRAY_OPS, *VOTES)} <= peers


@pytest.mark.usefixtures("cpu_as_device")
@pytest.mark.parametrize("op", [*ARRAY_OPS, *VOTES])
def test_wrong_result_on_a_device_ends_the_run(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(ops, op)

    def wrong(*arguments: Any, out: torch.Tensor, **options: Any) -> None:
        right(*arguments, out=out, **options)
        out.view(-1).view(torch.uint8)[40] ^= 1

    monkeypatch.setattr(ops, op, wrong)
    assert main(["bench", *SMALL, "--op", op, "--dtype", "float32"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"signvote bench: wrong result: {op}")
    assert ": cuda, threads 1" in error
    assert error.endswith("items are wrong, the first at 10\n")


@pytest.mark.usefixtures("cpu_as_device")
@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_memory_of_a_case_goes_with_its_contenders(device: torch.device | None) -> None:
    """With the garbage collector off, as it is in a run."""
    rows = dict.fromkeys(VOTES, 3)
    ops_there = [op for op in OPS if op != ("round_trip" if device is None else "codec")]
    with measure.no_garbage_collection():
        for op in ops_there:
            field, _ = contenders(Case(op, 0.01, rows=rows.get(op)), Data(), Options([("portable", 1)], device=device))
            for contender in field:
                contender.call()
            left = [weakref.ref(contender) for contender in field]
            del field, contender
            assert [found for reference in left if (found := reference()) is not None] == []


@pytest.mark.usefixtures("cpu_as_device")
def test_run_is_compared_with_one_on_the_same_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old.json"
    small = ["--size", "0.01", "--op", "pack_signs", "--dtype", "float32", "--json", str(old)]
    assert main(["bench", "--quick", *small]) == 0
    with pytest.raises(SystemExit):
        main(["bench", *SMALL, "--compare", str(old)])
    assert "old.json: expected a run with --device cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "2"], "argument --threads: expected none with --device cuda: it is the CPU's"),
        (["--implementation", "portable"], "argument --implementation: expected none with --device cuda"),
        ([], "argument --device: cuda: torch finds no CUDA device"),
        (["--op", "pack_signs"], "argument --device: cuda: torch finds no CUDA device"),
    ],
)
def test_what_no_device_can_do_is_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "find_module", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--device", "cuda", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_the_cuda_part_the_build_command_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "find_module", lambda: None)
    with pytest.raises(SystemExit):
        main(["bench", "--device", "cuda"])
    assert f"signvote was built without its CUDA part; in a checkout, with nvcc in PATH: {cuda.BUILD_COMMAND}" in (
        capsys.readouterr().err
    )


def test_cupy_that_cannot_be_imported_is_no_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cupy.py").write_text("raise RuntimeError('made for another CUDA')")
    monkeypatch.syspath_prepend(tmp_path)
    peers.find_cupy.cache_clear()
    assert peers.find_cupy() is None
    peers.find_cupy.cache_clear()


def test_bars_of_a_device() -> None:
    op = some_result(name="cuda", megabytes=1024, ratios={"limit": Spread(0.93, 0.92, 0.94)})
    slow = some_result(
        name="cuda", megabytes=1024, op="unpack_signs", limit="copy", ratios={"limit": Spread(0.8, 0.8, 0.8)}
    )
    few, small = some_result(name="cuda", megabytes=1024, op="majority_vote", rows=5), some_result(name="cuda")
    assert [(bar.what, bar.met, bar.note) for bar in bars.judge_cuda([op, slow, few, small])] == [
        ("pack_signs float32", True, "plain read"),
        ("unpack_signs float32", False, "plain copy"),
    ]


@pytest.mark.gpu
def test_run_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--out", str(tmp_path)]) == 0
    facts, measured = results.read(tmp_path / "bench.json")
    assert facts["machine"]["cuda"]["name"] == torch.cuda.get_device_name()
    assert all(np.isfinite(r.seconds.median) and r.seconds.median > 0 for r in measured)
