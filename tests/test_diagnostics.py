"""signvote.diagnostics against NumPy on all micro-batches at once, and against distributions that are known."""

import builtins
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from signvote.diagnostics import BIMODAL, GradientStatistics, density, draw

Stack = dict[str, NDArray[np.float64]]


def reference(stack: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """All of it in two passes; row i is the gradient of micro-batch i."""
    n, noise = len(stack), stack - stack.mean(axis=0)
    m2, m3, m4 = ((noise**power).mean(axis=0) for power in (2, 3, 4))
    skewness = m3 / m2**1.5 * math.sqrt(n * (n - 1)) / (n - 2)
    kurtosis = ((n + 1) * (m4 / m2**2 - 3) + 6) * (n - 1) / ((n - 2) * (n - 3))
    return {
        "mean": stack.mean(axis=0),
        "standard_deviation": stack.std(axis=0, ddof=1),
        "signal_to_noise": abs(stack.mean(axis=0)) / stack.std(axis=0, ddof=1),
        "skewness": skewness,
        "excess_kurtosis": kurtosis,
        "bimodality": (skewness**2 + 1) / (kurtosis + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))),
    }


def statistics_of(stack: Stack, dtype: torch.dtype = torch.float64, **options: Any) -> GradientStatistics:
    statistics = GradientStatistics(**options)
    for i in range(len(next(iter(stack.values())))):
        statistics.update({name: torch.tensor(rows[i]).to(dtype) for name, rows in stack.items()})
    return statistics


def assert_equal(statistics: GradientStatistics, stack: Stack, rtol: float = 1e-9) -> None:
    for name, rows in stack.items():
        for what, expected in reference(rows).items():
            got = getattr(statistics, what)[name]
            assert got.dtype is torch.float64
            np.testing.assert_allclose(got.numpy(), expected, rtol=rtol, atol=rtol, err_msg=f"{what} of {name}")


def samples(n: int = 50, seed: int = 0) -> Stack:
    """Gradients that are skewed, far from 0 and of different sizes."""
    rng = np.random.default_rng(seed)
    return {
        "weight": 1e-3 * rng.exponential(size=(n, 4, 5)) + rng.normal(size=(4, 5)),
        "bias": rng.uniform(-1, 1, size=(n, 7)) + 1e4,
        "scalar": rng.normal(size=n),
    }


# -- density ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
def test_density_of_known_vectors(as_tensor: bool) -> None:
    kind: Callable[[Any], Any] = torch.tensor if as_tensor else np.asarray
    one_hot = np.zeros(1000)
    one_hot[3] = -7.0
    assert density(kind(np.array([[2.0, -2.0], [-2.0, 2.0]]))) == 1.0
    assert density(kind(one_hot)) == pytest.approx(1 / 1000)
    assert density(kind(np.repeat([0.0, 5.0], [30, 10]))) == pytest.approx(1 / 4)
    assert density(kind(np.zeros(4))) == 0.0
    assert density(kind(np.array(-3.0))) == 1.0
    gaussian = np.random.default_rng(0).standard_normal(1_000_000)
    assert density(kind(gaussian)) == pytest.approx(2 / math.pi, abs=2e-3)


@given(
    hnp.arrays(
        np.float64,
        st.integers(1, 30),
        elements=st.floats(-1e300, 1e300).filter(lambda x: x == 0 or abs(x) > 1e-290),
    ),
    st.randoms(use_true_random=False),
    st.integers(-30, 10),
)
def test_density_is_within_its_bounds_whatever_scale_sign_and_order(v: NDArray[Any], shuffle: Any, power: int) -> None:
    found = density(v)
    if v.any():
        assert (1 - 1e-12) / v.size <= found <= 1
        order = list(range(v.size))
        shuffle.shuffle(order)
        assert density(-v[order]) == pytest.approx(found, rel=1e-12)
        assert density(math.ldexp(1e-3, power) * v) == pytest.approx(found, rel=1e-12)
    else:
        assert found == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_density_is_computed_in_float64(dtype: torch.dtype) -> None:
    v = torch.full((100_000,), 2.0**-7, dtype=dtype)
    v[::2] *= 2
    assert density(v) == pytest.approx(0.9, rel=1e-9)


def test_density_takes_what_autograd_and_views_give() -> None:
    assert density(torch.ones(3, requires_grad=True)) == 1.0
    assert density(np.ones(6)[::-2]) == 1.0
    assert density(np.ones(6, ml_dtypes.bfloat16)) == 1.0
    assert density(np.ones(6, ">f4")) == 1.0
    assert density(torch.ones(6, 4).t()[::2]) == 1.0


@pytest.mark.parametrize(
    ("v", "error", "message"),
    [
        ([1.0], TypeError, "density: v is a list, expected a NumPy array or a torch tensor"),
        (np.ones(3, np.int64), TypeError, "density: v is int64, expected float32, float64, float16 or bfloat16"),
        (torch.ones(3, dtype=torch.int32), TypeError, "density: v is torch.int32, expected float32"),
        (np.array([1.0, np.nan]), ValueError, "density: v has NaN or infinity"),
        (torch.tensor([math.inf]), ValueError, "density: v has NaN or infinity"),
        (torch.empty(0), ValueError, "density: v has no coordinates"),
        (torch.ones(3).to_sparse(), ValueError, "density: v has layout torch.sparse_coo, expected a dense tensor"),
    ],
)
def test_density_refuses(v: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        density(v)


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


# -- Summaries --------------------------------------------------------------------------------------------------------


def test_summary() -> None:
    stack = samples(30) | {"dead": np.zeros((30, 10))}
    statistics = statistics_of(stack)
    flat = np.concatenate([rows.reshape(30, -1) for rows in stack.values()], axis=1)
    expected = reference(flat[:, :-10])
    whole = statistics.summary()
    assert (whole.micro_batches, whole.coordinates, whole.noiseless) == (30, 38, 10)
    assert whole.gradient_density == pytest.approx(density(flat.mean(axis=0)))
    assert whole.noise_density == pytest.approx(density(flat.std(axis=0)))
    assert whole.density_ratio == pytest.approx(whole.noise_density / whole.gradient_density)
    assert whole.curvature_ratio_limit == pytest.approx(1 / whole.gradient_density)
    assert whole.noise_share == pytest.approx((flat.var(axis=0, ddof=1) / 30).sum() / (flat.mean(axis=0) ** 2).sum())
    for quantiles, values in (
        (whole.signal_to_noise, expected["signal_to_noise"]),
        (whole.absolute_skewness, abs(expected["skewness"])),
        (whole.bimodality, expected["bimodality"]),
    ):
        assert quantiles is not None
        for q, value in quantiles.items():
            assert value == pytest.approx(np.quantile(values, q, method="inverted_cdf"), rel=1e-6)
    assert whole.bimodal == pytest.approx((expected["bimodality"] > BIMODAL).mean())
    by_parameter = statistics.by_parameter()
    assert list(by_parameter) == list(stack)
    assert by_parameter["bias"].gradient_density == pytest.approx(density(stack["bias"].mean(axis=0)))
    assert by_parameter["dead"].signal_to_noise is None
    assert math.isnan(by_parameter["dead"].density_ratio)
    text = str(whole)
    assert "30 micro-batches, 38 coordinates, 10 without noise" in text
    assert f"ratio R2 {whole.density_ratio:.3g}" in text
    with pytest.raises(KeyError, match="no parameter is named 'x'; these are: weight, bias, scalar, dead"):
        statistics.summary("x")


@pytest.mark.parametrize(
    ("gradient", "noise", "case"),
    [
        (np.eye(100)[0], np.ones(100), "I or III"),  # noise everywhere, gradient in one place
        (np.ones(100), np.ones(100), "II"),
        (np.ones(100), np.eye(100)[0], "II"),  # Figure A.1's kind of noise
        (np.eye(100)[0], np.eye(100)[1], "II or III"),
    ],
)
def test_cases(gradient: NDArray[Any], noise: NDArray[Any], case: str) -> None:
    summary = statistics_of({"w": np.stack([gradient + noise, gradient - noise])}).summary()
    assert summary.cases() == case
    with pytest.raises(ValueError, match="cases: much is 1, expected a number above 1"):
        summary.cases(1)


# -- draw -------------------------------------------------------------------------------------------------------------


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
