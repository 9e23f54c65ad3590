"""`signvote demo`, run as a user runs it: processes, files and messages; not how well or how fast it trains."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from signvote.cli import main
from signvote.cli.json_values import finite

DEMO = [sys.executable, "-m", "signvote", "demo"]


def demo(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DEMO, *options], env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a short run printed, and the folder it wrote."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = demo("--steps", "3", "--workers", "2", "--compare", "--momentum", "0.5", "0.9", "--out", str(folder))
    assert result.returncode == 0, result.stderr
    return result.stdout, folder


@pytest.fixture(scope="module")
def report(run: tuple[str, Path]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run[1] / "demo.json").read_text())
    return report


def test_plot_is_a_picture(run: tuple[str, Path]) -> None:
    assert (run[1] / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_table_has_a_line_for_each_method(run: tuple[str, Path]) -> None:
    lines = run[0].splitlines()
    for label in ("majority vote", "AdamW", "SGD"):
        (line,) = (line for line in lines if line.startswith(label))
        assert line.endswith("yes")


def test_json_has_the_options(report: dict[str, Any]) -> None:
    options = report["options"]
    assert (options["steps"], options["workers"], options["momentum"]) == (3, 2, [0.5, 0.9])
    assert {"signvote", "torch", "python"} <= report["versions"].keys()


def test_a_run_that_diverged_leaves_a_file_that_loads() -> None:
    report = {"loss": float("nan"), "curve": [1.0, float("inf")], "steps": 3, "name": "vote"}
    assert finite(report) == {"loss": None, "curve": [1.0, None], "steps": 3, "name": "vote"}


def test_replicas_are_identical(report: dict[str, Any]) -> None:
    assert [result["replicas_identical"] for result in report["results"]] == [True, True, True]


def test_losses_cover_the_run(report: dict[str, Any]) -> None:
    for result in report["results"]:
        assert len(result["train_losses"]) == 3


def test_vote_sends_one_bit_for_each_coordinate(report: dict[str, Any]) -> None:
    vote, *others = report["results"]
    coordinates = vote["coordinates"]
    least = 2 * (2 - 1) / 2 * coordinates / 8  # sharded: 2 (M - 1) / M bits, before padding and trailers
    assert least <= vote["bytes_sent_per_step"] < 1.02 * least
    assert vote["stats"]["coordinates"] == 3 * coordinates
    for result in others:
        assert result["bytes_sent_per_step"] == 2 * (2 - 1) / 2 * 4 * coordinates


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "argument --workers: expected 1 or more, got 0"),
        (["--steps", "many"], "argument --steps: invalid"),
        (["--topology", "ring"], "argument --topology: invalid choice: 'ring'"),
        (["--momentum", "1"], "momentum: expected a number in [0, 1)"),
        (["--momentum", "0.5", "0.6", "0.7"], "argument --momentum: expected one or two numbers, got 3"),
        (["--lr", "0"], "argument --lr: expected a number above 0, got 0.0"),
        (["--seed", "-1"], "seed: expected an integer from 0"),
        (["--seed", str(2**32)], "argument --seed: expected at most 4294967295"),
    ],
)
def test_bad_option_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("extra", ["tqdm", "matplotlib"])
def test_missing_extra_is_named_at_once(
    extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == f"signvote demo: needs {extra}: pip install 'signvote[demo]'\n"


def test_one_worker_needs_no_other(tmp_path: Path) -> None:
    result = demo("--steps", "1", "--workers", "1", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "One worker alone sends nothing." in result.stdout


def test_failing_worker_ends_the_demo_with_its_error(tmp_path: Path) -> None:
    result = demo("--steps", "3", "--workers", "2", "--out", str(tmp_path), SIGNVOTE_IMPLEMENTATION="mmx")
    assert result.returncode == 1
    assert " failed: ValueError: SIGNVOTE_IMPLEMENTATION is 'mmx'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("default_sigint")
def test_interrupt_ends_every_process(tmp_path: Path) -> None:
    arguments = [*DEMO, "--workers", "2", "--steps", "100000", "--out", str(tmp_path)]
    with subprocess.Popen(arguments, stdout=PIPE, stderr=PIPE, start_new_session=True) as process:
        assert process.stderr is not None
        said = b""
        while not re.search(rb"[1-9]\d*/100000", said):  # the progress bar
            more = os.read(process.stderr.fileno(), 4096)
            assert more, said.decode()
            said += more
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
        said += process.stderr.read()  # ends when the last process has closed it
    assert process.returncode == 130
    assert said.endswith(b"signvote: interrupted\n")
    assert b"Traceback" not in said
