"""What draw takes and refuses, and that it draws."""

import builtins
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from micro_batches import samples, statistics_of
from signvote.diagnostics import draw


@pytest.mark.parametrize("shape", [True, False])
@pytest.mark.parametrize("keep", [0, 4])
def test_draw(tmp_path: Path, shape: bool, keep: int) -> None:
    statistics = statistics_of(samples() | {"dead": np.zeros((50, 2))}, shape=shape, keep=keep)
    votes = {"weight": SimpleNamespace(agreement=0.8, margin=0.6), "bias": SimpleNamespace(agreement=1.0, margin=1.0)}
    figure = draw(statistics, votes)
    assert len(figure.axes) == 3 + shape + keep
    figure.savefig(tmp_path / "gradients.png")
    assert len(draw(statistics).axes) == 2 + shape + keep


def test_draw_of_nothing_but_zeros(tmp_path: Path) -> None:
    draw(statistics_of({"w": np.zeros((4, 3))})).savefig(tmp_path / "zeros.png")


def test_draw_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = statistics_of(samples())
    with pytest.raises(TypeError, match="draw: statistics is a dict, expected a GradientStatistics"):
        draw({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="draw: 3 gradients seen, expected 4 or more"):
        draw(statistics_of(samples(3)))
    with pytest.raises(ValueError, match=r"votes\['w'\].margin is 1.5, expected a number from 0 to 1"):
        draw(statistics, {"w": SimpleNamespace(agreement=0.5, margin=1.5)})
    real = builtins.__import__

    def without_matplotlib(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(
        ImportError, match=r"signvote.diagnostics.draw needs matplotlib: pip install 'signvote\[bench\]'"
    ):
        draw(statistics)
