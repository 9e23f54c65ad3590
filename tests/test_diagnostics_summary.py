"""What a summary says, against NumPy and in cases that are known."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from micro_batches import reference, samples, statistics_of
from signvote.diagnostics import BIMODAL, density


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
