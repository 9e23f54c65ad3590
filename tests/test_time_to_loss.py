"""`bench/time_to_loss.py` on trainings of a few steps: what it keeps, computes and prints; not who is sooner."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import labs
import time_to_loss
from ddp import loss_report, trainings
from ddp.training import Curve, Run, Timing, Turns

METHODS = {"vote", "fp32", "fp16", "powersgd-1", "powersgd-4"}
COORDINATES = 460_032


@pytest.mark.usefixtures("needs_lab")
def test_all_is_measured_reported_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    arguments = [*tiny, "--rate", "1gbit", "--out", str(tmp_path)]
    assert time_to_loss.main([*arguments, "--stop-after", "0.05"]) == 0  # one piece only
    assert "goes on from" in capsys.readouterr().out
    begun = json.loads((tmp_path / "time_to_loss.json").read_text())
    assert [len(begun["timings"]), len(begun["curves"])] == [1, 0]

    assert time_to_loss.main(arguments) == 0
    out = capsys.readouterr().out
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
        *((method, "1gbit") for method in ("vote", "fp32")),
    }
    for curve in trained:
        assert curve["at"] == [0, 2, 4]
        assert curve["losses"][2] < curve["losses"][0]
        assert 0.0 == curve["seconds"][0] < curve["seconds"][1] < curve["seconds"][2]
        assert curve["identical"]
        assert curve["run"]["lr"] == found["learning_rates"][curve["run"]["method"]]
    assert [check["same_losses"] for check in found["checks"]] == [True, True]
    for method in ("majority vote", "AdamW, fp32", "AdamW, fp16 hook", "AdamW, PowerSGD 1", "AdamW, PowerSGD 4"):
        assert out.count(f"\n{method}  ") == 1 + 2 * 2 + (method in ("majority vote", "AdamW, fp32"))

    assert time_to_loss.main(arguments) == 0
    assert out.endswith(capsys.readouterr().out)  # nothing is measured again
    assert not labs.namespaces_of(os.getpid())


def test_a_loss_is_reached_between_two_measurements() -> None:
    curve = Curve(
        Run("fp32", 1e-3, 0, 4, 30, 10, "held-out", "none"),
        at=[0, 10, 20, 30],
        losses=[6.0, 4.0, None, 2.0],
        seconds=[0.0, 1.0, 2.0, 3.0],
        identical=True,
    )
    assert loss_report.steps_to(curve, 7.0) == 0.0
    assert loss_report.steps_to(curve, 4.5) == 7.5
    assert loss_report.steps_to(curve, 3.0) == 30.0  # the loss before was no number
    assert loss_report.steps_to(curve, 1.9) is None


def test_powersgd_begins_with_steps_of_fp32() -> None:
    turns = Turns(["fp32", "powersgd-4"], 4, 0.0, 3, "100mbit")
    timing = Timing(turns, {"fp32": [0.2, 0.3, 0.4], "powersgd-4": [0.1, 0.1, 9.0]}, {})
    assert loss_report.clock(timing, "fp32", 20) == pytest.approx(20 * 0.3)
    assert loss_report.clock(timing, "powersgd-4", 5) == pytest.approx(5 * 0.3)
    assert loss_report.clock(timing, "powersgd-4", 20) == pytest.approx(10 * 0.3 + 10 * 0.1)


def test_bars_speak_of_the_lowest_loss_at_100_megabits() -> None:
    def times(rate: str, sleep: float, method: str, loss: float, *ratios: float | None) -> loss_report.Times:
        return loss_report.Times(rate, sleep, method, loss, [1.0] * len(ratios), list(ratios))

    found = [
        times("1gbit", 0.0, "fp32", 1.75, 9.0),
        times("100mbit", 0.0, "fp32", 1.95, 9.0),
        times("100mbit", 0.0, "fp32", 1.75, 5.5, 4.7),
        times("100mbit", 0.0, "fp16", 1.75, 0.8, 1.1),
        times("100mbit", 0.02, "fp32", 1.75, 9.0, None),
    ]
    (text,) = loss_report.bars(found)
    met, slower, unknown = text.splitlines()
    assert met.startswith("met   100mbit, computed on this machine: AdamW, fp32 takes 5.10 (4.70-5.50) times as long")
    assert slower.startswith("MISS  100mbit, computed on this machine: AdamW, fp16 hook takes 0.95 ")
    assert unknown.startswith("MISS  100mbit, 20 ms a step slept instead of computed: AdamW, fp32 takes in 1 of 2 ")
    assert "to 1.75; bar 5" in met


def test_the_grid_of_learning_rates_grows_where_its_end_is_best() -> None:
    plan = trainings.Plan(4, 200, 10, (0,), ("1gbit",), 0.02, 8, True)
    store = trainings.Store()

    def try_all(loss: Any) -> list[float]:
        while missing := [lr for lr in plan.learning_rates("vote", store) if lr not in plan.tried("vote", store)]:
            for lr in missing:
                store.curves.append(Curve(plan.tuning("vote", lr), [0, 100], [6.0, loss(lr)], [0.0, 1.0], True))
        return sorted(plan.tried("vote", store))

    assert try_all(lambda lr: abs(math.log(lr / 1.1e-3))) == [5e-4, 1e-3, 2e-3, 4e-3]
    assert plan.best("vote", store) == 1e-3
    store.curves.clear()
    assert try_all(lambda lr: abs(math.log(lr / 2e-4))) == [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    store.curves.clear()
    assert len(try_all(lambda lr: None if lr < 2e-3 else -lr)) == trainings.MOST_SETTINGS
    other = replace(plan.tuning("vote", 1.0), steps=7)  # of another plan
    store.curves.append(Curve(other, [0, 7], [6.0, -100.0], [0.0, 1.0], True))
    assert plan.best("vote", store) == max(plan.learning_rates("vote", store))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--sleep", "0"), "argument --sleep: expected more than 0 and less than 60, got 0"),
        (("--steps", "0"), "argument --steps: expected 1 or more, got 0"),
        (("--rate", "fast"), "rate: expected none, or 100kbit"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[str, str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        time_to_loss.main([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": 0}, "expected format 1, got 0"),
        ({"machine": {"cpu": "Z80"}}, "machine: caches: expected "),
        ({"versions": {}}, "versions: numpy: expected "),
    ],
)
def test_a_file_of_another_format_machine_or_version_is_refused(
    change: dict[str, Any], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "time_to_loss.json"
    trainings.Store().write(path)
    assert trainings.Store.read(path) == trainings.Store()
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SystemExit) as stop:
        time_to_loss.main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert problem in capsys.readouterr().err
