"""How dense a vector is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from signvote.arguments import DTYPES, TORCH_DTYPES, AnyArray
from signvote.diagnostics.gradients import check_gradient


def density(v: AnyArray) -> float:
    r"""The density of a vector, equation (1) of the paper:

    .. math::
        \phi(v) = \frac{\|v\|_1^2}{d \, \|v\|_2^2}

    It is 1 where all :math:`d` coordinates have the same magnitude and :math:`1/d` where a single one is not 0. A
    large vector of independent Gaussian coordinates has :math:`2/\pi`. Neither scale, signs nor order matter.

    Args:
        v: Array or tensor of float32, float64, float16 or bfloat16, of any shape. Computed in float64.

    Returns:
        A number from :math:`1/d` to 1; 0.0, which no other vector has, where all coordinates are 0.

    Raises:
        TypeError: ``v`` is not an array or a tensor, or has another dtype.
        ValueError: ``v`` is empty, or has NaN or infinity.
    """
    if isinstance(v, np.ndarray) and v.dtype.name in TORCH_DTYPES.values():
        v = torch.from_numpy(v.astype(np.float64, order="C"))
    if isinstance(v, np.ndarray):
        raise TypeError(f"density: v is {v.dtype}, expected {DTYPES}")
    if not isinstance(v, Tensor):
        raise TypeError(f"density: v is a {type(v).__name__}, expected a NumPy array or a torch tensor")
    check_gradient("density: v", v)
    if v.numel() == 0:
        raise ValueError("density: v has no coordinates, expected one or more")
    return density_of_parts([v.detach().to(torch.float64)])


def density_of_parts(parts: Sequence[Tensor]) -> float:
    """The density of the concatenated float64 tensors."""
    top = max(float(part.abs().max()) for part in parts if part.numel())
    if top == 0.0:
        return 0.0
    l1 = sum(float((part / top).abs().sum()) for part in parts)
    l2_squared = sum(float((part / top).square().sum()) for part in parts)
    return min(1.0, l1 * l1 / (sum(part.numel() for part in parts) * l2_squared))
