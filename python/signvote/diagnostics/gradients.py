"""What is taken for a gradient, and for those of a micro-batch by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from signvote.arguments import DTYPES, TORCH_DTYPES


def check_gradient(what: str, x: Tensor) -> None:
    if x.dtype not in TORCH_DTYPES:
        raise TypeError(f"{what} is {x.dtype}, expected {DTYPES}")
    if x.layout is not torch.strided:
        raise ValueError(f"{what} has layout {x.layout}, expected a dense tensor")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{what} has NaN or infinity, expected finite coordinates")


def named_gradients(op: str, gradients: Any) -> dict[str, Tensor]:
    expected = "model.named_parameters(), model.parameters() or a dictionary from names to gradients"
    if isinstance(gradients, (Tensor, torch.nn.Module)) or not isinstance(gradients, Iterable):
        raise TypeError(f"{op}: gradients is a {type(gradients).__name__}, expected {expected}")
    found: dict[str, Tensor] = {}
    if isinstance(gradients, Mapping):
        for name, gradient in gradients.items():
            if not isinstance(gradient, Tensor) or isinstance(gradient, torch.nn.Parameter):
                raise TypeError(
                    f"{op}: gradients[{name!r}] is a {type(gradient).__name__}, expected a gradient, a Tensor"
                )
            found[str(name)] = gradient.detach()
    else:
        missing = True
        for place, item in enumerate(gradients):
            name, parameter = item if isinstance(item, tuple) and len(item) == 2 else (str(place), item)
            if not isinstance(parameter, Tensor):
                raise TypeError(f"{op}: item {place} of gradients is a {type(item).__name__}, expected {expected}")
            if name in found:
                raise ValueError(f"{op}: two parameters are named {name!r}, expected different names")
            if parameter.requires_grad:
                missing = missing and parameter.grad is None
                found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
        if found and missing:
            raise ValueError(f"{op}: no parameter has a gradient, expected a call after backward()")
    if not found:
        raise ValueError(f"{op}: gradients has no parameter that requires a gradient, expected {expected}")
    if not any(gradient.numel() for gradient in found.values()):
        raise ValueError(f"{op}: gradients has no coordinates, expected one or more")
    return found
