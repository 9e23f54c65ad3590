"""`bench/bench_ddp.py` on sizes that are measured at once: what it checks, prints and writes; not how fast it is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_ddp
import labs
import netlab
from ddp import predictions, report, results
from ddp.calibration import Calibration
from ddp.results import Measurement
from ddp.worker import schedule
from ranks import RankError, RankPool
from signvote.cli.bench.measure import MAX_ROUNDS, Spread
from signvote.cli.plan.model import Codec, Compute, Host, Link, predict

VOTES = [f"{topology}/{momentum}" for topology in ("sharded", "allgather", "server") for momentum in ("0", "0.9")]


@pytest.mark.usefixtures("needs_lab")
def test_every_method_is_checked_measured_and_reported(tmp_path: Path) -> None:
    arguments = ["--workers", "2", "--rate", "1gbit", "--work", "exchange", "demo", "--size", "100000", "1000000"]
    # fp32 all-reduce of the larger one needs 32 ms.
    done = labs.run("bench_ddp.py", *arguments, "--seconds", "0.1", "--longest", "0.03", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ddp.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "ddp.json").read_text())
    assert document["machine"]["cpu"]
    found: dict[tuple[str, int, str], dict[str, Any]] = {
        (one["workload"], one["coordinates"], one["method"]): one for one in document["measurements"]
    }
    skipped = found.pop(("exchange", 1_000_000, "fp32"))
    assert skipped["seconds"] is None
    assert "takes more than 0.032 s" in done.stdout
    every = {"fp32", "fp16", "powersgd-1", "powersgd-4", *VOTES}
    for d, methods in ((100_000, every), (1_000_000, every - {"fp32"})):
        assert {method for workload, size, method in found if (workload, size) == ("exchange", d)} == methods
    for (workload, d, method), one in found.items():
        assert 0 < one["seconds"]["low"] <= one["seconds"]["median"] <= one["seconds"]["high"]
        assert one["samples"] >= 3
        assert f"\n  {method} " in done.stdout
        assert (one["predicted"] is None) == method.startswith(("powersgd", "noop"))
        if workload == "demo":
            assert one["times_noop"]["median"] > 0
        if workload == "exchange" and d == 100_000:
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
    assert found["demo", 460_032, "noop"]["payload_sent"] == 0
    assert "predicted ms" in done.stdout
    predicted = sum(one["predicted"] is not None for one in found.values())
    assert f"signvote plan, off the measured time by (worst of {predicted}, " in done.stdout
    assert document["calibration"]["host"]["message_seconds"] > 0
    assert re.search(r"^About \d+\.\d minutes in 1 launches\.$", done.stdout, re.MULTILINE)


CODEC = Codec(pack=0.4e-9, vote=4e-12, unpack=0.2e-9, to_half=0.2e-9, from_half=0.2e-9)
CALIBRATION = Calibration({0.0: CODEC, 0.9: replace(CODEC, pack=0.8e-9)}, Host(message_seconds=1e-4, byte_seconds=1e-9))


def measurement(method: str, workload: str = "exchange", seconds: float = 0.1, workers: int = 4) -> Measurement:
    spread = Spread(seconds, 0.9 * seconds, 1.1 * seconds)
    return Measurement(
        workload, 10**7, [10**6] * 10, workers, "1gbit", method, 1.0, 1.0, None, seconds=spread, samples=7
    )


@pytest.mark.parametrize("workload", ["exchange", "sleep", "cpu"])
@pytest.mark.parametrize(
    ("method", "name", "momentum"),
    [("fp32", "allreduce", 0.0), ("fp16", "fp16", 0.0), ("server/0", "server", 0.0), ("sharded/0.9", "sharded", 0.9)],
)
def test_predictions_are_those_of_plan_in_the_lab(
    workload: str, method: str, name: str, momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "usable_cpus", lambda: 2)
    ours = [measurement("powersgd-1", workload), measurement(method, workload)]
    noop = measurement("noop", workload, seconds=3.0)
    elsewhere = replace(measurement("noop", workload, seconds=7.0), workers=2)
    rank_1, own = predictions.with_predictions([noop, elsewhere, *ours], CALIBRATION)[2:]
    assert rank_1.predicted is None
    compute = None if workload == "exchange" else Compute(3.0, on_cpu=workload == "cpu")
    expected = predict(
        name,
        own.buckets,
        4,
        Link(1e9, latency_seconds=0.0, burst_bytes=125_000),
        codec=CALIBRATION.codecs[momentum],
        host=replace(CALIBRATION.host, workers_per_cpu=2.0),
        compute=compute,
    )
    assert own.predicted == (expected.exchange_seconds if compute is None else expected.step_seconds)


def test_unlimited_links_take_no_time() -> None:
    (own,) = predictions.with_predictions([replace(measurement("fp32"), rate="none")], CALIBRATION)
    (limited,) = predictions.with_predictions([measurement("fp32")], CALIBRATION)
    assert own.predicted is not None
    assert limited.predicted is not None
    assert 0 < own.predicted < limited.predicted


def test_the_worst_prediction_is_the_bar() -> None:
    measured = [replace(measurement(method), predicted=0.1 * off) for method, off in (("fp32", 1.2), ("fp16", 0.7))]
    (bar,) = report.judge([*measured, measurement("powersgd-1")])
    assert "(worst of 2, 1 are within 0.25: exchange, fp16, 10M, M=4, 1gbit)" in bar.what
    assert bar.measured.median == pytest.approx(0.3)
    assert bar.measured.high == pytest.approx(1 - 0.07 / 0.11)
    assert not bar.met
    assert report.judge(measured[:1])[0].met
    row = report.table(measured).splitlines()[-1].split()
    assert row[:5] == ["fp16", "100.0", "90.0-110.0", "70.0", "0.70"]


@pytest.mark.parametrize(("samples", "shown"), [(1, "1 run"), (2, "2 runs"), (3, "0-0.111")])
def test_few_samples_have_no_quartiles_and_no_sure_bar(samples: int, shown: str) -> None:
    (bar,) = report.judge([replace(measurement("fp32"), predicted=0.1, samples=samples)])
    assert bar.met
    assert bar.sure == (samples > 2)
    assert shown in report.bars_table([bar])


@pytest.mark.parametrize(("samples", "shown"), [(1, "1 run"), (2, "2 runs"), (3, "90.0-110.0")])
def test_few_samples_have_no_quartiles(samples: int, shown: str) -> None:
    row = report.table([replace(measurement("fp32"), samples=samples)]).splitlines()[-1]
    assert re.split(" {2,}", row.strip())[:3] == ["fp32", "100.0", shown]


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"format": 1, "measurements": []}')
    with pytest.raises(ValueError, match="expected format 2, got 1"):
        results.read(path)


def test_what_a_launch_measured_before_it_failed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NoLab:
        bits_per_second = 1e9

        def __init__(self, workers: int, rate: str) -> None: ...
        def __enter__(self) -> NoLab:
            return self

        def __exit__(self, *error: object) -> None: ...

    def run_ranks(lab: object, module: str, *paths: Path) -> None:
        results.write(paths[-1], [measurement("fp32")])
        raise TimeoutError("not done after 900 seconds")

    monkeypatch.setattr(netlab, "Lab", NoLab)
    monkeypatch.setattr(bench_ddp, "calibrate", lambda: CALIBRATION)
    monkeypatch.setattr(bench_ddp, "run_ranks", run_ranks)
    assert bench_ddp.main(["--workers", "4", "--rate", "1gbit", "--json", str(tmp_path / "some.json")]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == "bench_ddp: not done after 900 seconds"
    assert "exchange of one bucket, 10,000,000 coordinates in 10 buckets, M=4, 1gbit\n  fp32" in printed.out
    assert [one.method for one in results.read(tmp_path / "some.json")] == ["fp32"]


@pytest.mark.parametrize(
    ("estimates", "rounds", "turns"),
    [
        ([0.1, 0.1], 10, [10, 10]),
        ([0.001, 0.002], MAX_ROUNDS, [MAX_ROUNDS, MAX_ROUNDS]),
        ([0.1, 0.3, 1.2, 4.5], 7, [7, 7, 3, 1]),
        ([], 0, []),
    ],
)
def test_slow_methods_take_part_in_fewer_rounds(estimates: list[float], rounds: int, turns: list[int]) -> None:
    assert schedule(estimates, 2.0, 7) == (rounds, turns)


def check(result: str, own: list[float], found: list[float]) -> None:
    from ddp import worker
    from ddp.methods import NOOP

    method = replace(NOOP, name="this one", result=result)
    worker.check(method, worker.window([torch.tensor(own)]), [torch.tensor(found)])


RIGHT = [1.0] * 100_000


@pytest.mark.parametrize(
    ("result", "own", "found", "problem"),
    [
        ("mean", [1.0, -2.0], [1.0, -2.1], "off the mean by 5.0e-02"),
        ("vote", [1.0, -2.0], [1.0, 1.0], "1 of 2 coordinates follow the minority"),
        ("vote", [1.0, 0.0], [1.0, 0.0], "there are votes other than +1 and -1"),
        ("approximation", [1.0, -2.0], [0.0, 0.0], "nothing but zeros"),
        ("own", [1.0, -2.0], [1.0, 2.0], "the gradients have changed"),
        pytest.param("mean", RIGHT, [*RIGHT[1:], 2.0], "off the mean by 1.0e+00", id="at the end of a large gradient"),
    ],
)
def test_wrong_results_are_found(
    ranks: RankPool, result: str, own: list[float], found: list[float], problem: str
) -> None:
    with pytest.raises(RankError) as info:
        ranks.run(check, result, own, found, world=1)
    assert f"WrongResultError: this one: {problem}" in str(info.value)


def exchange(coordinates: int) -> None:
    from ddp.workloads import Exchange

    Exchange(coordinates)


def test_bad_sizes_are_named(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"exchange: expected a multiple of 1000 .*, got 2500000"):
        ranks.run(exchange, 2_500_000, world=1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--rate", "fast"], "rate: expected none, or 100kbit"),
        (["--quick", "--workers", "2"], "argument --quick: expected without --workers"),
    ],
)
def test_bad_options_are_named(options: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_ddp.main(options)
    assert stop.value.code == 2
    assert problem in capsys.readouterr().err
