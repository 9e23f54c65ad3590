"""Parameters and gradients for tests of signvote.optim, and steps with them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from signvote.optim import SignSGD, Signum

OptimizerClass = type[SignSGD] | type[Signum]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIMIZERS = [SignSGD, Signum]


def steps(
    optimizer: torch.optim.Optimizer, params: Sequence[Parameter], gradients: Iterable[Sequence[Tensor | None]]
) -> None:
    """One step for each row of gradients, which has one gradient for each parameter."""
    for row in gradients:
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else g.detach().clone()
        optimizer.step()


def random_parameters(seed: int, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (0,), (1,), (7, 5), (2, 3, 4), (1000,)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes for dtype in dtypes]
    tensors.append(torch.randn(8, 6, generator=generator).t())
    return [Parameter(t) for t in tensors]


def random_gradients(params: Sequence[Parameter], seed: int, count: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=generator).to(p.dtype) for p in params] for _ in range(count)]


def bits(tensors: Iterable[Tensor]) -> list[list[int]]:
    return [t.detach().contiguous().view(-1).view(torch.uint8).tolist() for t in tensors if t.numel()]
