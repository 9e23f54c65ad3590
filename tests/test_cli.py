"""The commands, run as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import signvote
from signvote.cli import info, main
from signvote.cuda import find_module


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "signvote", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_info_names_what_is_installed() -> None:
    result = command("info")
    assert result.returncode == 0, result.stderr
    facts = dict(re.split(" {2,}", line, maxsplit=1) for line in result.stdout.splitlines())
    assert facts["signvote"] == signvote.__version__
    assert facts["implementations"].startswith(", ".join(signvote.implementations()))
    expected = os.environ.get("SIGNVOTE_CUDA", "OFF" if find_module() is None else "ON")  # .ci/run says which
    if expected == "OFF":
        assert facts["CUDA"].startswith("not built")
    else:
        assert facts["CUDA"].startswith("built for ")
        assert facts["CUDA of torch"] == (torch.version.cuda or "none")
        assert facts["CUDA available"] == ("yes" if signvote.cuda_available() else "no")
        assert not facts["CUDA devices"].startswith("none") or not signvote.cuda_available()
    assert facts["gloo"] == "available"


def test_info_shows_what_cuda_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def devices() -> None:
        raise RuntimeError("devices: CUDA: cudaErrorInsufficientDriver: too old")

    module = SimpleNamespace(
        architectures="75-real 90", devices=devices, driver_version=lambda: 0, runtime_version=lambda: 13000
    )
    monkeypatch.setattr(info, "find_module", lambda: module)
    assert main(["info"]) == 0
    assert "none (devices: CUDA: cudaErrorInsufficientDriver: too old)" in capsys.readouterr().out

    def broken() -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(info, "find_module", broken)
    assert main(["info"]) == 0
    assert "built, but cannot be imported: undefined symbol" in capsys.readouterr().out


def test_info_shows_the_chosen_implementation() -> None:
    result = command("info", SIGNVOTE_IMPLEMENTATION="portable")
    assert "portable (SIGNVOTE_IMPLEMENTATION=portable)" in result.stdout


def test_info_refuses_an_unknown_implementation() -> None:
    result = command("info", SIGNVOTE_IMPLEMENTATION="mmx")
    assert result.returncode == 1
    assert "SIGNVOTE_IMPLEMENTATION is 'mmx'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "usage: signvote" in capsys.readouterr().err
