"""Fixtures of all tests."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

import cuda_stand_in
import labs
import signvote
from ranks import RankPool

# The same examples in every run: a failure is one of this commit, not of the day.
hypothesis.settings.register_profile("signvote", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("signvote")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test for a GPU is skipped without one; but it fails if such tests were asked for."""
    if item.get_closest_marker("gpu") is None or has_gpu():
        return
    reason = "needs a CUDA device, signvote built with its CUDA part and a torch built for CUDA"
    if item.config.getoption("markexpr") == "gpu":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@functools.cache
def has_gpu() -> bool:
    return signvote.cuda_available()


@pytest.fixture(params=signvote.implementations())
def implementation(request: pytest.FixtureRequest) -> str:
    """Every implementation that this CPU can run."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``_cuda`` on the CPU."""
    return cuda_stand_in.build_module(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device, and the stand-in for one."""
    if request.param == "cuda":
        return torch.device("cuda", 0)
    return cuda_stand_in.use_module(request.getfixturevalue("stand_in"), monkeypatch)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four real gloo ranks, which stay up between tests."""
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def needs_lab() -> None:
    """For tests that are skipped on a machine that cannot have a lab."""
    if (reason := labs.refusal()) is not None:
        pytest.skip(reason)


@pytest.fixture
def default_sigint() -> Iterator[None]:
    """For tests that interrupt a program: a shell without job control has its background jobs ignore SIGINT, and what
    they start inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
