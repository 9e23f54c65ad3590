"""What :func:`signvote.unpack_signs` refuses to write, in the documented words."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import signvote
from bad_input import NEGATIVE, NW, W, check, described, read_only


@pytest.mark.parametrize(
    ("out", "error", "message"),
    described(
        (torch.ones(99), ValueError, "out has 99 coordinates, expected 100"),
        (torch.ones(200)[::2], ValueError, "out is not contiguous"),
        (torch.ones(100).int(), TypeError, "out is torch.int32, expected float32, float64, float16 or bfloat16"),
        (torch.ones(100).double(), TypeError, "out is torch.float64, expected torch.float32"),
        (torch.ones(100, requires_grad=True), ValueError, "out requires gradients, expected a tensor outside autograd"),
        (np.ones(100, np.float32), TypeError, "out is a ndarray, expected a torch tensor like the other arguments"),
        (torch.ones(100, device="meta"), ValueError, "out is on device meta, expected cpu"),
        (NEGATIVE, ValueError, "out has its negative bit set"),
    ),
)
def test_coordinates_out(out: Any, error: type[Exception], message: str) -> None:
    dtype = torch.float32 if "float64" in message.split(",")[0] else None
    with pytest.raises(error, match="^unpack_signs: " + re.escape(message)):
        signvote.unpack_signs(W, 100, dtype=dtype, out=out)
    if isinstance(out, np.ndarray) or out.device.type == "cpu":
        assert (abs(out) == 1).all()


def test_read_only_coordinates_out() -> None:
    check(
        lambda out: signvote.unpack_signs(NW, 100, out=read_only(out)),
        np.ones(100, np.float32),
        ValueError,
        "unpack_signs: out is read-only, expected a writable array",
    )


@pytest.mark.parametrize("dtype", [torch.int32, "float8", "int32", np.float32, torch.complex64, 3])
def test_dtype_of_torch(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"^unpack_signs: dtype is .*, expected torch's float32"):
        signvote.unpack_signs(W, 100, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.int32, "float8", ">f4", torch.float32, 3])
def test_dtype_of_numpy(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"^unpack_signs: dtype is .*, expected NumPy's float32"):
        signvote.unpack_signs(NW, 100, dtype=dtype)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (float("nan"), "float32"),
        (float("inf"), "float64"),
        (-(10**400), "float64"),
        (1e39, "float32"),
        (65520.0, "float16"),
        (3.4e38, "bfloat16"),
        (1e39, "bfloat16"),
    ],
)
def test_scale_that_the_dtype_does_not_hold(scale: float, dtype: str) -> None:
    with pytest.raises(ValueError, match=rf"^unpack_signs: scale is .*, expected a number that is finite in {dtype}"):
        signvote.unpack_signs(W, 100, dtype=dtype, scale=scale)


@pytest.mark.parametrize("scale", ["large", None])
def test_scale_that_is_no_number(scale: Any) -> None:
    check(
        lambda out: signvote.unpack_signs(W, 100, scale=scale, out=out),
        torch.ones(100),
        TypeError,
        f"unpack_signs: scale is {scale!r}, expected a number",
    )
