"""What the README shows is run: its commands stand where they are looked for, and its Python does what it says."""

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import signvote
from ranks import RankPool
from signvote.ddp import attach

README = Path(__file__).parents[1] / "README.md"
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in FENCES if language == "python"]


def python_with(text: str) -> str:
    (code,) = [code for code in PYTHON if text in code]
    return code


def test_the_first_two_commands_are_the_demo_and_the_tests() -> None:
    lines = [line for _, code in FENCES for line in code.splitlines()]
    demo, tests = [re.sub(" *#.*", "", line) for line in lines if "signvote demo" in line or "pytest" in line]
    assert demo.endswith("&& signvote demo")
    assert tests.endswith("&& pytest")


@pytest.mark.parametrize("code", [code for code in PYTHON if "# Equivalent to:" in code], ids=["ops", "coins"])
def test_what_is_called_equivalent_is(code: str) -> None:
    namespace: dict[str, Any] = {"np": np, "signvote": signvote}
    compared = 0
    for paragraph in code.split("\n\n"):
        shown, _, equivalent = paragraph.partition("# Equivalent to:\n")
        exec(shown, namespace)
        if equivalent:
            names = [ast.unparse(ast.parse(text).body[-1]).partition(" = ")[0] for text in (shown, equivalent)]
            assert names[0] == names[1]
            result = namespace[names[0]]
            exec(equivalent, namespace)
            np.testing.assert_array_equal(result, namespace[names[1]], strict=isinstance(result, np.ndarray))
            compared += 1
    assert compared == code.count("# Equivalent to:") > 0


def _train(use_it: str, checkpoint: str, folder: str) -> dict[str, Any]:
    """The README's script for one rank, with a model and a loop around it, and its checkpoint."""
    import os

    import torch.distributed as dist

    os.chdir(folder)
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    before = model.weight.detach().clone()
    script: dict[str, Any] = {"torch": torch, "dist": dist, "model": model}
    exec(use_it, script)
    torch.manual_seed(dist.get_rank())
    torch.autograd.backward(script["ddp"](torch.randn(8, 5)).square().sum())
    script["optimizer"].step()
    exec(checkpoint, script)
    moved = (model.weight - before * (1 - 1e-3 * 0.1)).abs()
    return {"calls": script["state"].stats().calls, "moved": moved.tolist(), "weight": model.weight.tolist()}


def _attach_with_options(code: str) -> list[str]:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3))
    script: dict[str, Any] = {
        "attach": attach,
        "ddp": torch.nn.parallel.DistributedDataParallel(model),
        "model": model,
    }
    exec(code, script)
    torch.autograd.backward(script["ddp"](torch.randn(8, 5)).square().sum())
    parameters = script["state"]._parameters
    return [name for place, name in enumerate(parameters.names) if place in parameters.excluded]


def test_options(ranks: RankPool) -> None:
    for excluded in ranks.run(_attach_with_options, python_with("exclude=norms"), world=3):
        assert excluded == ["1.weight", "1.bias"]


def test_diagnostics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    script: dict[str, Any] = {
        "model": torch.nn.Linear(5, 3),
        "micro_batches": [(torch.randn(4, 5), torch.randn(4, 3)) for _ in range(8)],
        "loss_fn": torch.nn.functional.mse_loss,
    }
    exec(python_with("GradientStatistics"), script)
    assert "density" in capsys.readouterr().out
    assert (tmp_path / "gradients.png").stat().st_size > 0


def test_use_and_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    results = ranks.run(_train, python_with("optimizer = SignSGD"), python_with("state_dict"), str(tmp_path), world=2)
    assert results[0] == results[1]
    assert results[0]["calls"] == 1
    np.testing.assert_allclose(results[0]["moved"], 1e-3, rtol=1e-3)
