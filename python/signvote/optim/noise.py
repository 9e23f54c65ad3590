"""Gaussian noise on updates, which all workers draw alike from a seed.

Integers and a table: torch.randn gives other bits on another kind of CPU, and other numbers on a GPU.
"""

from __future__ import annotations

import functools
from statistics import NormalDist

import torch
from torch import Tensor


def normal_noise(p: Tensor, dtype: torch.dtype, stream: int) -> Tensor:
    """Normal noise in the shape of p: 16-bit digit i % 4 of mix(stream + i // 4) is the number of i's quantile."""
    words = torch.arange(-(-p.numel() // 4), dtype=torch.int64, device=p.device).add_(stream)
    digits = _mix_(words).view(torch.int16)[: p.numel()].to(torch.int32).bitwise_and_(0xFFFF)
    return _quantiles(p.device, dtype).index_select(0, digits).view(p.shape)


def noise_streams(seed: int, step: int, first: int, count: int) -> list[int]:
    """mix(mix(mix(seed) + step) + i) for i = first, first + 1, ..."""
    start = _mix_(torch.tensor([seed - 2**64 if seed >= 2**63 else seed])).add_(step)
    numbers: list[int] = _mix_(_mix_(start) + torch.arange(first, first + count)).tolist()
    return numbers


def _mix_(x: Tensor) -> Tensor:
    """One step of splitmix64 in place, for int64 taken as unsigned."""
    x.add_(0x9E3779B97F4A7C15 - 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 31).bitwise_and_(2**33 - 1))


@functools.cache
def _quantiles(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Those of the normal distribution at (k + 1/2) / 65536, as float32 numbers: no rounding of a logarithm shows."""
    lower = [NormalDist().inv_cdf((k + 0.5) / 65536) for k in range(32768)]
    return torch.tensor([*lower, *(-x for x in reversed(lower))], dtype=torch.float32).to(device, dtype)
