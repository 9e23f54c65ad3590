"""What the tests of errors share: good and bad input, and how they see that nothing was written."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import signvote
from samples import without_memory
from signvote import ops

SENTINEL = 0x5A5A5A5A
X = torch.linspace(-1, 1, 100)
NX = X.numpy()
W = signvote.pack_signs(X)
NW = signvote.pack_signs(NX)
NEGATIVE: torch.Tensor = torch._neg_view(torch.ones(100))
HALF = (0.5, 0.5, 0.5, 0.5)


def words(numel: int = 4) -> torch.Tensor:
    return torch.full((numel,), SENTINEL, dtype=torch.int32)


def numpy_words(numel: int = 4) -> Any:
    return np.full(numel, SENTINEL, np.uint32)


def read_only(array: Any) -> Any:
    view = array.view()
    view.flags.writeable = False
    return view


def misaligned(array: Any) -> Any:
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype)
    view[:] = array
    return view


def check(call: Callable[[Any], object], out: Any, error: type[Exception], message: str) -> None:
    before = out.tobytes() if isinstance(out, np.ndarray) else bytes(out.untyped_storage())
    with pytest.raises(error, match="^" + re.escape(message)):
        call(out)
    after = out.tobytes() if isinstance(out, np.ndarray) else bytes(out.untyped_storage())
    assert before == after


def quietly(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Without torch's warnings about kinds of tensors that it calls deprecated or beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def described(*cases: tuple[Any, type[Exception], str]) -> list[Any]:
    """Cases with their message for a name."""
    return [pytest.param(*case, id=case[-1].split(",")[0]) for case in cases]


def row(place: int = 0, first: int = 0, numel: int = 100, coordinate: int = 0, word: int = 0) -> Any:
    """A table of one run."""
    return np.array([[place, first, numel, coordinate, word]])


COORDINATES = described(
    (X.int(), TypeError, "x is torch.int32, expected float32, float64, float16 or bfloat16"),
    (X > 0, TypeError, "x is torch.bool, expected float32"),
    (X.to(torch.complex64), TypeError, "x is torch.complex64, expected float32"),
    (quietly(lambda: torch.quantize_per_tensor(X, 1, 0, torch.qint8)), TypeError, "x is torch.qint8, expected float32"),
    (X.to(torch.float8_e5m2), TypeError, "x is torch.float8_e5m2, expected float32"),
    (X.to_sparse(), ValueError, "x has layout torch.sparse_coo, expected a dense tensor; x.to_dense() makes one"),
    (quietly(X.reshape(10, 10).to_sparse_csr), ValueError, "x has layout torch.sparse_csr, expected a dense tensor"),
    (X.to("meta"), ValueError, "x is on device meta, expected cpu"),
    (X.reshape(10, 10).T, ValueError, "x is not contiguous, expected a C-contiguous array; numpy.ascontiguousarray"),
    (X[::2], ValueError, "x is not contiguous"),
    (X[:1].expand(100), ValueError, "x is not contiguous"),
    (NEGATIVE, ValueError, "x has its negative bit set, expected a plain tensor; x.resolve_neg() makes one"),
    (torch.zeros(5, dtype=torch.complex64).conj().imag, ValueError, "x has its negative bit set"),
    (NX.astype(np.int64), TypeError, "x is int64, expected float32"),
    (NX > 0, TypeError, "x is bool, expected float32"),
    (NX.astype(np.complex64), TypeError, "x is complex64, expected float32"),
    (NX.astype(np.longdouble), TypeError, f"x is {np.dtype(np.longdouble)}, expected float32"),
    (NX.astype(">f4"), TypeError, "x is >f4, expected float32"),
    (NX.astype(object), TypeError, "x is object, expected float32"),
    (np.asfortranarray(NX.reshape(10, 10)), ValueError, "x is not contiguous"),
    (NX[::-1], ValueError, "x is not contiguous"),
    (misaligned(NX), ValueError, "x is not aligned, expected an address that is a multiple of 4"),
    ([1.0, 2.0], TypeError, "x is a list, expected a NumPy array or a torch tensor"),
    (1.0, TypeError, "x is a float, expected a NumPy array or a torch tensor"),
    (np.float32(1.0), TypeError, "x is a float32, expected a NumPy array or a torch tensor"),
    (None, TypeError, "x is a NoneType, expected a NumPy array or a torch tensor"),
)


def check_tensors_without_memory(device: torch.device) -> None:
    """That the ops refuse them, except empty ones."""
    ones, zeros = torch.ones(100, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    message = r"is a \w*Tensor without memory of its own, expected a plain tensor$"
    for x in without_memory(torch.float32, 100, device):
        with pytest.raises(ValueError, match="^pack_signs: x " + message):
            signvote.pack_signs(x)
        with pytest.raises(ValueError, match="^has_nonfinite: x " + message):
            signvote.has_nonfinite(x)
        with pytest.raises(ValueError, match="^pack_momentum: momentum " + message):
            ops.pack_momentum(ones, x, coefficients=HALF)
        with pytest.raises(ValueError, match="^unpack_signs: out " + message):
            signvote.unpack_signs(zeros, 100, out=x)
    for words_of_none in without_memory(torch.int32, 4, device):
        with pytest.raises(ValueError, match="^pack_signs: out " + message):
            signvote.pack_signs(ones, out=words_of_none)
        with pytest.raises(ValueError, match=r"^majority_vote: stack\[1\] " + message):
            signvote.majority_vote([zeros, words_of_none])
        with pytest.raises(ValueError, match="^unpack_signs: words " + message):
            signvote.unpack_signs(words_of_none, 100)
        with pytest.raises(ValueError, match="^unpack_ternary: planes " + message):
            signvote.unpack_ternary(words_of_none, 100)
    empty = torch.empty(0, device=device)
    assert signvote.pack_signs(empty).shape == (0,)
    assert not signvote.has_nonfinite(empty)
