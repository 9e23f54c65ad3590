"""GradientStatistics against NumPy on all micro-batches at once, and against distributions that are known."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from micro_batches import assert_equal, samples, statistics_of
from signvote.diagnostics import BIMODAL, GradientStatistics

# -- The moments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 5, 50])
def test_moments_are_those_of_all_micro_batches_at_once(n: int) -> None:
    stack = samples(n)
    statistics = statistics_of(stack)
    assert statistics.count == n
    assert statistics.names == ["weight", "bias", "scalar"]
    assert_equal(statistics, stack, rtol=1e-7)


@given(st.integers(4, 12), st.floats(-1e6, 1e6), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_moments_far_from_zero(n: int, offset: float, size: float, seed: int) -> None:
    stack = {"w": offset + size * np.random.default_rng(seed).standard_normal((n, 3))}
    # The relative error of a value's distance from the mean is that of the value times this, and powers multiply it.
    assert_equal(statistics_of(stack), stack, rtol=1e-11 * (1 + abs(offset) / size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_gradients_are_summed_in_float64(dtype: torch.dtype) -> None:
    rows = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    stack = {"w": rows.to(torch.float64).numpy()}
    assert_equal(statistics_of(stack, dtype), stack, rtol=1e-9)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 2**32 - 1), st.booleans())
def test_merged_statistics_are_those_of_all(a: int, b: int, seed: int, shape: bool) -> None:
    stack = samples(a + b + 4, seed)
    first, second = GradientStatistics(shape=shape), GradientStatistics(shape=shape)
    for i in range(a + b + 4):
        (first if i < a else second).update({name: torch.tensor(rows[i]) for name, rows in stack.items()})
    first.merge(second)
    assert first.count == a + b + 4
    if shape:
        assert_equal(first, stack, rtol=1e-6)
    for name, rows in stack.items():
        np.testing.assert_allclose(first.standard_deviation[name], rows.std(axis=0, ddof=1), rtol=1e-6)
    for (name, index), noise in first.noise.items():
        values = stack[name].reshape(len(noise), -1)[:, index]
        np.testing.assert_array_equal(np.sort(noise), np.sort(values - values.mean()))


def test_merging_leaves_the_other_alone() -> None:
    stack = samples(8)
    first, second = GradientStatistics(), statistics_of(stack)
    first.merge(second)
    first.update({name: torch.tensor(rows[0]) for name, rows in stack.items()})
    assert (first.count, second.count) == (9, 8)
    assert_equal(second, stack, rtol=1e-7)
    second.merge(GradientStatistics())
    assert second.count == 8


def test_statistics_survive_pickling_and_go_on() -> None:
    stack = samples(12)
    statistics = GradientStatistics(device="cpu")
    for i in range(12):
        statistics = pickle.loads(pickle.dumps(statistics))
        statistics.update({name: torch.tensor(rows[i]) for name, rows in stack.items()})
    assert_equal(statistics, stack, rtol=1e-7)


def test_without_shape_there_is_no_shape() -> None:
    statistics = statistics_of(samples(), shape=False)
    np.testing.assert_allclose(statistics.mean["bias"], samples()["bias"].mean(axis=0))
    with pytest.raises(ValueError, match=r"GradientStatistics.skewness needs shape=True"):
        _ = statistics.skewness
    summary = statistics.summary()
    assert summary.signal_to_noise is not None
    assert (summary.absolute_skewness, summary.bimodality, summary.bimodal) == (None, None, None)


@pytest.mark.parametrize(
    ("draws", "skewness", "kurtosis", "bimodality"),
    [
        (lambda rng, size: rng.standard_normal(size), 0.0, 0.0, 1 / 3),
        (lambda rng, size: rng.uniform(-1, 1, size), 0.0, -1.2, BIMODAL),
        (lambda rng, size: rng.choice([-1.0, 1.0], size), 0.0, -2.0, 1.0),
        (lambda rng, size: np.where(rng.random(size) < 0.1, 50.0, -1.0), 8 / 3, 46 / 9, 1.0),
    ],
    ids=["gaussian", "uniform", "two values", "remark 3"],
)
def test_shape_of_known_distributions(draws: Any, skewness: float, kurtosis: float, bimodality: float) -> None:
    stack = {"w": draws(np.random.default_rng(0), (400, 1000))}
    statistics = statistics_of(stack)
    assert float(statistics.skewness["w"].mean()) == pytest.approx(skewness, abs=0.05)
    assert float(statistics.excess_kurtosis["w"].mean()) == pytest.approx(kurtosis, abs=0.4)
    assert float(statistics.bimodality["w"].mean()) == pytest.approx(bimodality, abs=0.02)


# -- What update() takes ----------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = torch.nn.Linear(3, 2)
        self.unused = torch.nn.Linear(2, 2, bias=False)
        self.frozen = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)

    def forward(self, x: Tensor, use: bool) -> Tensor:
        y: Tensor = self.frozen(self.used(x))
        return (self.unused(y) if use else y).square().mean()


def test_update_after_backward() -> None:
    torch.manual_seed(0)
    net, by_name, by_place, by_dict = Net(), GradientStatistics(), GradientStatistics(), GradientStatistics()
    for i in range(6):
        net.zero_grad()
        net(torch.randn(5, 3), use=i % 2 == 0).backward()
        by_name.update(net.named_parameters())
        by_place.update(net.parameters())
        by_dict.update({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()})
    assert by_name.names == ["used.weight", "used.bias", "unused.weight"]
    assert by_place.names == ["0", "1", "2"]
    assert not by_dict.mean["frozen.weight"].any()
    for name, place in zip(by_name.names, by_place.names, strict=True):
        assert torch.equal(by_name.mean[name], by_place.mean[place])
        assert torch.equal(by_name.skewness[name], by_dict.skewness[name])


NET = Net()


@pytest.mark.parametrize(
    ("gradients", "error", "message"),
    [
        (NET, TypeError, r"gradients is a Net, expected model.named_parameters\(\)"),
        (torch.ones(3), TypeError, "gradients is a Tensor, expected"),
        (3, TypeError, "gradients is a int, expected"),
        ([1.0], TypeError, "item 0 of gradients is a float, expected"),
        (dict(NET.named_parameters()), TypeError, r"gradients\['used.weight'\] is a Parameter, expected a gradient"),
        (NET.parameters(), ValueError, r"no parameter has a gradient, expected a call after backward\(\)"),
        ([torch.ones(3)], ValueError, "gradients has no parameter that requires a gradient"),
        ({}, ValueError, "gradients has no parameter that requires a gradient"),
        ({"w": torch.empty(0)}, ValueError, "gradients has no coordinates"),
        ([("w", NET.used.weight), ("w", NET.used.bias)], ValueError, "two parameters are named 'w'"),
        ({"w": torch.ones(2, dtype=torch.int64)}, TypeError, "the gradient of 'w' is torch.int64, expected float32"),
        ({"w": torch.tensor([math.nan])}, ValueError, "the gradient of 'w' has NaN or infinity"),
        ({"w": torch.ones(2).to_sparse()}, ValueError, "the gradient of 'w' has layout torch.sparse_coo"),
    ],
)
def test_update_refuses(gradients: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^GradientStatistics\.update: .*" + message):
        GradientStatistics().update(gradients)


def test_update_refuses_other_names_and_shapes_and_takes_nothing() -> None:
    statistics = GradientStatistics()
    statistics.update({"v": torch.ones(2), "w": torch.ones(3)})
    for gradients, message in (
        ({"v": torch.ones(2)}, "gradients has no 'w'"),
        ({"v": torch.ones(2), "w": torch.ones(3), "x": torch.ones(1)}, "gradients has 'x'"),
        ({"v": torch.ones(2), "w": torch.ones(4)}, r"gradients has shape \(4,\) for 'w', expected \(3,\)"),
        ({"v": torch.zeros(2), "w": torch.full((3,), math.inf)}, "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            statistics.update(gradients)
    assert statistics.count == 1
    assert statistics.mean["v"].tolist() == [1.0, 1.0]


def test_options_and_merge_refuse() -> None:
    with pytest.raises(ValueError, match="GradientStatistics: keep is -1"):
        GradientStatistics(keep=-1)
    with pytest.raises(TypeError, match=r"GradientStatistics: keep is 0\.5, expected an integer"):
        GradientStatistics(keep=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"GradientStatistics: keep\['w'\] is 'a'"):
        GradientStatistics(keep={"w": "a"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="keep names 'x', expected one of w"):
        GradientStatistics(keep={"x": [0]}).update({"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"keep\['w'\] has index 2, expected one below 2"):
        GradientStatistics(keep={"w": [2]}).update({"w": torch.ones(2)})
    stack = {"w": np.ones((5, 40))}
    statistics = statistics_of(stack)
    for other, error, message in (
        (3, TypeError, "other is a int"),
        (statistics, ValueError, "other is this one itself"),
        (statistics_of(stack, shape=False), ValueError, "other has shape=False, expected shape=True"),
        (statistics_of({"v": stack["w"]}), ValueError, "other has no 'w'"),
        (statistics_of({"w": np.ones((5, 41))}), ValueError, r"other has shape \(41,\) for 'w'"),
        (statistics_of(stack, seed=1), ValueError, "other keeps the coordinates"),
    ):
        with pytest.raises(error, match=r"GradientStatistics.merge: " + message):
            statistics.merge(other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other keeps the coordinates"):
        GradientStatistics(seed=1).merge(statistics)
    assert statistics.count == 5


@pytest.mark.parametrize(
    ("what", "least"), [("mean", 1), ("standard_deviation", 2), ("skewness", 3), ("bimodality", 4), ("noise", 1)]
)
def test_too_few_gradients(what: str, least: int) -> None:
    statistics = GradientStatistics()
    for seen in range(least):
        with pytest.raises(ValueError, match=rf"{what}: {seen} gradients seen, expected {least} or more"):
            getattr(statistics, what)
        statistics.update({"w": torch.tensor([float(seen)])})
    getattr(statistics, what)


# -- Kept coordinates -------------------------------------------------------------------------------------------------


def test_kept_coordinates_and_their_histogram() -> None:
    stack = samples()
    statistics = statistics_of(stack, keep={"weight": [0, 7, 7], "scalar": [0]})
    noise = statistics.noise
    assert list(noise) == [("weight", 0), ("weight", 7), ("scalar", 0)]
    values = stack["weight"][:, 1, 2]
    np.testing.assert_array_equal(noise["weight", 7], values - values.mean())
    counts, edges = statistics.noise_histogram("weight", 7, bins=5)
    assert counts.sum() == 50
    assert (edges[0], edges[-1]) == (noise["weight", 7].min(), noise["weight", 7].max())
    with pytest.raises(KeyError, match="coordinate 1 of 'weight' was not kept"):
        statistics.noise_histogram("weight", 1)


def test_random_coordinates_are_spread_over_all() -> None:
    gradients = {"small": torch.ones(100), "empty": torch.ones(0), "large": torch.ones(2, 150)}
    found = []
    for seed in range(50):
        statistics = GradientStatistics(keep=20, seed=seed)
        statistics.update(gradients)
        assert len(statistics.noise) == 20
        assert all(index < gradients[name].numel() for name, index in statistics.noise)
        found += [name for name, _ in statistics.noise]
    assert found.count("small") == pytest.approx(250, abs=50)
    everything = GradientStatistics(keep=1000)
    everything.update(gradients)
    assert len(everything.noise) == 400
