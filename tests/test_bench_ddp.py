"""`bench/bench_ddp.py` on sizes that are measured at once: what it checks, prints and writes; not how fast it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from test_netlab import REFUSAL, namespaces_of

BENCH = Path(__file__).parent.parent / "bench"
PROGRAM = [sys.executable, str(BENCH / "bench_ddp.py")]
VOTES = [f"{topology}/{momentum}" for topology in ("sharded", "allgather", "server") for momentum in ("0", "0.9")]


def run(*arguments: str) -> tuple[int, str, str]:
    with subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=110)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    assert not (REFUSAL is None and namespaces_of(process.pid))
    return process.returncode, out, err


def in_a_job_of_one(script: str) -> subprocess.CompletedProcess[str]:
    """``script`` where the parts of the benchmark and a process group of one rank are at hand."""
    begin = """if True:
        import torch, torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    """
    path = os.pathsep.join([str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", begin + script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
def test_every_method_is_checked_measured_and_reported(tmp_path: Path) -> None:
    arguments = ["--workers", "2", "--rate", "1gbit", "--work", "exchange", "demo", "--size", "100000"]
    status, out, err = run(*arguments, "--seconds", "0.1", "--out", str(tmp_path))
    assert status == 0, err
    assert (tmp_path / "ddp.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "ddp.json").read_text())
    assert document["machine"]["cpu"]
    measured: dict[tuple[str, str], dict[str, Any]] = {
        (one["workload"], one["method"]): one for one in document["measurements"]
    }
    exchanged = {method for workload, method in measured if workload == "exchange"}
    assert exchanged == {"fp32", "fp16", "powersgd-1", "powersgd-4", *VOTES}
    for (workload, method), one in measured.items():
        assert 0 < one["seconds"]["low"] <= one["seconds"]["median"] <= one["seconds"]["high"]
        assert one["samples"] >= 3
        assert f"\n  {method} " in out
        if workload == "exchange":
            d = 100_000
            payload = {
                "fp32": 4 * d,
                "fp16": 2 * d,
                "powersgd-1": 4 * (1099 + 1000),
                "powersgd-4": 4 * (4 * 1099 + 1000),
            }
            # A vote has trailers and parameters that begin at multiples of 64; two ranks send each other all of it.
            expected = payload.get(method, d / 8)
            assert expected <= max(one["payload_sent"], one["payload_received"]) <= 1.01 * expected + 64
            assert one["floor"] == pytest.approx(8 * expected / 1e9)
            assert expected < one["link_sent"] < 1.3 * expected + 10_000
            assert set(one["times_faster"]) == {"fp32", "fp16", "powersgd-1", "powersgd-4"} - {method}
        else:
            assert one["times_noop"]["median"] > 0
    assert measured["demo", "noop"]["payload_sent"] == 0


@pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
def test_what_takes_too_long_is_skipped_and_said(tmp_path: Path) -> None:
    arguments = ["--workers", "2", "--rate", "1mbit", "--work", "exchange", "--size", "100000", "--longest", "0.5"]
    status, out, err = run(*arguments, "--method", "fp32", "sharded/0", "--json", str(tmp_path / "some.json"))
    assert status == 0, err
    assert "takes more than 3 s" in out
    measured = json.loads((tmp_path / "some.json").read_text())["measurements"]
    assert {one["method"]: one["seconds"] is None for one in measured} == {"fp32": True, "sharded/0": False}


@pytest.mark.parametrize(
    ("result", "own", "found", "problem"),
    [
        ("mean", "[1.0, -2.0]", "[1.0, -2.1]", "off the mean by 5.0e-02"),
        ("vote", "[1.0, -2.0]", "[1.0, 1.0]", "1 of 2 coordinates follow the minority"),
        ("vote", "[1.0, 0.0]", "[1.0, 0.0]", "there are votes other than +1 and -1"),
        ("approximation", "[1.0, -2.0]", "[0.0, 0.0]", "nothing but zeros"),
        ("own", "[1.0, -2.0]", "[1.0, 2.0]", "the gradients have changed"),
    ],
)
def test_wrong_results_are_found(result: str, own: str, found: str, problem: str) -> None:
    done = in_a_job_of_one(f"""
        from dataclasses import replace
        from ddp import worker
        from ddp.methods import NOOP
        method = replace(NOOP, name="this one", result={result!r})
        worker.check(method, torch.tensor({own}), [torch.tensor({found})])
    """)
    assert done.returncode != 0
    assert f"WrongResultError: this one: {problem}" in done.stderr


def test_a_wrong_result_at_the_end_of_a_large_gradient_is_found() -> None:
    done = in_a_job_of_one("""
        from dataclasses import replace
        from ddp import worker
        from ddp.methods import NOOP
        right = torch.ones(100_000)
        wrong = right.clone()
        wrong[-1] = 2
        worker.check(replace(NOOP, name="this one", result="mean"), worker.window([right]), [wrong])
    """)
    assert "WrongResultError: this one: off the mean by 1.0e+00" in done.stderr


def test_bad_sizes_and_rates_are_named() -> None:
    done = in_a_job_of_one("""
        from ddp.workloads import Exchange
        Exchange(2_500_000)
    """)
    assert "exchange: expected a multiple of 1000" in done.stderr
    assert "got 2500000" in done.stderr
    status, _, err = run("--rate", "fast")
    assert status == 2
    assert "rate: expected none, or 100kbit" in err
    status, _, err = run("--quick", "--workers", "2")
    assert status == 2
    assert "argument --quick: expected without --workers" in err
