"""The density of vectors that are known, its bounds, and what it refuses."""

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from signvote.diagnostics import density


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
