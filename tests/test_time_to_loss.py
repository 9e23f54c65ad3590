"""`bench/time_to_loss.py` on trainings of a few steps: what it keeps, computes and prints; not who is sooner."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labs import namespaces_of, refusal

REFUSAL = refusal()

BENCH = Path(__file__).parent.parent / "bench"
METHODS = {"vote", "fp32", "fp16", "powersgd"}
COORDINATES = 460_032


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("time_to_loss")


def run(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, str(BENCH / "time_to_loss.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=110)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    assert not (REFUSAL is None and namespaces_of(process.pid))
    return process.returncode, out, err


@pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
def test_all_is_measured_reported_and_kept(tmp_path: Path) -> None:
    tiny = [
        "--workers",
        "2",
        "--steps",
        "4",
        "--every",
        "2",
        "--seeds",
        "0",
        "--rounds",
        "1",
        "--sleep",
        "0.002",
        "--no-tuning",
    ]
    arguments = [*tiny, "--rate", "100mbit", "--out", str(tmp_path)]
    status, out, err = run(*arguments, "--stop-after", "0.05")  # one piece only
    assert status == 0, err
    assert "goes on from" in out
    begun = json.loads((tmp_path / "time_to_loss.json").read_text())
    assert [len(begun["timings"]), len(begun["curves"])] == [1, 0]

    status, out, err = run(*arguments)
    assert status == 0, err
    assert (tmp_path / "time_to_loss.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "time_to_loss.json").read_text())
    assert found["machine"]["cpu"]
    assert found["timings"][0] == begun["timings"][0]
    for timing in found["timings"]:
        assert set(timing["seconds"]) == {"noop", *METHODS}
        assert min(min(samples) for samples in timing["seconds"].values()) > timing["turns"]["sleep"]
        sent = timing["link_sent"]
        assert 4 * COORDINATES < sent["fp32"] < 4.8 * COORDINATES
        assert 2 * COORDINATES < sent["fp16"] < 2.4 * COORDINATES
        assert COORDINATES / 8 < sent["vote"] < sent["fp16"]
    trained = [curve for curve in found["curves"] if curve["run"]["pieces"] == "held-out"]
    assert {(curve["run"]["method"], curve["run"]["rate"]) for curve in trained} == {
        *((method, "none") for method in METHODS),
        *((method, "100mbit") for method in ("vote", "fp32")),
    }
    for curve in trained:
        assert curve["at"] == [0, 2, 4]
        assert curve["losses"][2] < curve["losses"][0]
        assert 0.0 == curve["seconds"][0] < curve["seconds"][1] < curve["seconds"][2]
        assert curve["identical"]
        assert curve["run"]["lr"] == found["learning_rates"][curve["run"]["method"]]
    assert [check["same_losses"] for check in found["checks"]] == [True, True]
    assert "100mbit, 2 ms a step slept instead of computed: AdamW, fp32 takes" in out

    status, again, err = run(*arguments)
    assert status == 0, err
    assert out.endswith(again)  # nothing is measured again


def test_a_loss_is_reached_between_two_measurements(program: Any) -> None:
    curve = program.Curve(
        program.Run("fp32", 1e-3, 0, 4, 30, 10, "held-out", "none"),
        at=[0, 10, 20, 30],
        losses=[6.0, 4.0, None, 2.0],
        seconds=[0.0, 1.0, 2.0, 3.0],
        identical=True,
    )
    assert program.steps_to(curve, 7.0) == 0.0
    assert program.steps_to(curve, 4.5) == 7.5
    assert program.steps_to(curve, 3.0) == 30.0  # the loss before was no number
    assert program.steps_to(curve, 1.9) is None


def test_powersgd_begins_with_steps_of_fp32(program: Any) -> None:
    turns = program.Turns(["fp32", "powersgd"], 4, 0.0, 3, "100mbit")
    timing = program.Timing(turns, {"fp32": [0.2, 0.3, 0.4], "powersgd": [0.1, 0.1, 9.0]}, {})
    assert program.clock(timing, "fp32", 20) == pytest.approx(20 * 0.3)
    assert program.clock(timing, "powersgd", 5) == pytest.approx(5 * 0.3)
    assert program.clock(timing, "powersgd", 20) == pytest.approx(10 * 0.3 + 10 * 0.1)


def test_the_grid_of_learning_rates_grows_where_its_end_is_best(program: Any) -> None:
    plan = program.Plan(4, 200, 10, (0,), ("1gbit",), 0.02, 8, True)
    store = program.Store()

    def try_all(loss: Any) -> list[float]:
        while missing := [lr for lr in plan.learning_rates("vote", store) if lr not in plan.tried("vote", store)]:
            for lr in missing:
                store.curves.append(program.Curve(plan.tuning("vote", lr), [0, 100], [6.0, loss(lr)], [0.0, 1.0], True))
        return sorted(plan.tried("vote", store))

    assert try_all(lambda lr: abs(math.log(lr / 1.1e-3))) == [5e-4, 1e-3, 2e-3, 4e-3]
    assert plan.best("vote", store) == 1e-3
    store.curves.clear()
    assert try_all(lambda lr: abs(math.log(lr / 2e-4))) == [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    store.curves.clear()
    assert len(try_all(lambda lr: None if lr < 2e-3 else -lr)) == program.MOST_SETTINGS
    other = replace(plan.tuning("vote", 1.0), steps=7)  # of another plan
    store.curves.append(program.Curve(other, [0, 7], [6.0, -100.0], [0.0, 1.0], True))
    assert plan.best("vote", store) == max(plan.learning_rates("vote", store))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--sleep", "0"), "argument --sleep: expected more than 0 and less than 60, got 0"),
        (("--steps", "0"), "argument --steps: expected 1 or more, got 0"),
        (("--rate", "fast"), "rate: expected none, or 100kbit"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, str], problem: str, tmp_path: Path) -> None:
    status, _, err = run(*arguments, "--out", str(tmp_path))
    assert status == 2
    assert problem in err


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "time_to_loss.json").write_text('{"format": 0}')
    status, _, err = run("--out", str(tmp_path))
    assert status == 2
    assert "expected format 1, got 0" in err
