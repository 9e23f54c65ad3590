"""What SignSGD and Signum refuse, and what they take for a number."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from optimizer_steps import OPTIMIZERS, OptimizerClass, steps
from signvote.optim import Signum


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1e-4}, ValueError, r"Signum: lr is -0\.0001, expected 0 <= lr < inf"),
        ({"lr": float("nan")}, ValueError, r"Signum: lr is nan"),
        ({"lr": float("inf")}, ValueError, r"Signum: lr is inf"),
        ({"lr": torch.tensor(1e-4)}, TypeError, r"Signum: lr is a Tensor, expected a float"),
        ({"lr": "1e-4"}, TypeError, r"Signum: lr is a str, expected a float"),
        ({"momentum": 1.0}, ValueError, r"Signum: momentum is 1\.0, expected 0 <= momentum < 1"),
        ({"momentum": -0.1}, ValueError, r"Signum: momentum is -0\.1"),
        ({"momentum": True}, TypeError, r"Signum: momentum is a bool, expected a float"),
        ({"weight_decay": -1}, ValueError, r"Signum: weight_decay is -1, expected 0 <= weight_decay < inf"),
        ({"weight_decay": None}, TypeError, r"Signum: weight_decay is a NoneType, expected a float"),
        ({"noise": -0.1}, ValueError, r"Signum: noise is -0\.1, expected 0 <= noise < inf"),
        ({"noise": "0.1"}, TypeError, r"Signum: noise is a str, expected a float"),
        ({"seed": 1.0}, TypeError, r"Signum: seed is a float, expected an int"),
        ({"seed": True}, TypeError, r"Signum: seed is a bool, expected an int"),
        ({"seed": 2**64}, ValueError, r"Signum: seed is 18446744073709551616, expected 0 <= seed < 2\*\*64"),
        ({"seed": -1}, ValueError, r"Signum: seed is -1"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    p, q = (Parameter(torch.ones(1)) for _ in range(2))
    with pytest.raises(error, match=message):
        Signum([p], **options)
    optimizer = Signum([p])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [q], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_numpy_scalars_and_integers_are_numbers(optimizer_class: OptimizerClass) -> None:
    p = Parameter(torch.ones(1))
    steps(optimizer_class([p], np.float64(0.5), weight_decay=1), [p], [[torch.ones(1)]])
    assert p.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_other_dtypes_are_refused(optimizer_class: OptimizerClass, dtype: torch.dtype) -> None:
    p = torch.zeros(1).to(dtype)
    message = rf"{optimizer_class.__name__}: parameter 1 of group 0 has dtype {dtype}, expected float16, bfloat16"
    with pytest.raises(TypeError, match=message):
        optimizer_class([torch.zeros(1), p])


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_sparse_gradients_are_refused_before_anything_is_changed(optimizer_class: OptimizerClass) -> None:
    dense = Parameter(torch.ones(2))
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = optimizer_class([dense, embedding.weight], 0.5)
    torch.autograd.backward(embedding(torch.tensor([1])).sum() + dense.sum())
    with pytest.raises(RuntimeError, match=rf"{optimizer_class.__name__} does not support gradients of layout"):
        optimizer.step()
    assert dense.tolist() == [1.0] * 2
    assert torch.equal(embedding.weight, before)
    assert not optimizer.state
