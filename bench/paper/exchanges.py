"""The exchanges of Table 1 through a parameter server, in the open: for counting bits, not for use.

Rank 0 is the server, and a worker too. QSGD has one level, as Table 1 has it: it and TernGrad send s·sign(g)·ξ, where ξ
is 1 with probability |g| / s and otherwise 0, and differ in the scale s: the norm of the gradient and its largest
magnitude. The largest s of all workers is everybody's, so that the server can add what the workers sent as integers
from -M to M, and send one of 2M + 1 levels for each coordinate back. TernGrad's clipping of large coordinates and
QSGD's coding of the zeros are left out: neither is in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

import signvote


@dataclass
class Wire:
    """Messages between all ranks and the server, and the bytes of those that this rank has sent."""

    bytes_sent: int = 0

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    def to_server(self, message: Tensor) -> list[Tensor]:
        """On the server the messages of all ranks, its own among them; elsewhere nothing."""
        if self.rank > 0:
            self._send(message, 0)
            return []
        received = [message, *(torch.empty_like(message) for _ in range(1, self.size))]
        for rank in range(1, self.size):
            dist.recv(received[rank], rank)
        return received

    def from_server(self, message: Tensor) -> Tensor:
        """The server's message, on every rank; elsewhere it says only how long it is."""
        if self.rank > 0:
            received = torch.empty_like(message)
            dist.recv(received, 0)
            return received
        for rank in range(1, self.size):
            self._send(message, rank)
        return message

    def _send(self, message: Tensor, rank: int) -> None:
        dist.send(message, rank)
        self.bytes_sent += message.nbytes


@dataclass(frozen=True)
class Exchange:
    """What an exchange gave: the gradient that every rank steps by, and what this rank gave to it."""

    result: Tensor
    contribution: Tensor


def sgd(wire: Wire, gradient: Tensor, generator: torch.Generator) -> Exchange:
    """The mean in full precision."""
    received = wire.to_server(gradient)
    mean = torch.stack(received).mean(dim=0) if received else torch.empty_like(gradient)
    return Exchange(wire.from_server(mean), gradient)


def qsgd(wire: Wire, gradient: Tensor, generator: torch.Generator) -> Exchange:
    return _ternary_mean(wire, gradient, gradient.norm(), generator)


def terngrad(wire: Wire, gradient: Tensor, generator: torch.Generator) -> Exchange:
    return _ternary_mean(wire, gradient, gradient.abs().max(), generator)


EXCHANGES: dict[str, Callable[[Wire, Tensor, torch.Generator], Exchange]] = {
    "SGD": sgd,
    "QSGD": qsgd,
    "TernGrad": terngrad,
}


def _ternary_mean(wire: Wire, gradient: Tensor, own_scale: Tensor, generator: torch.Generator) -> Exchange:
    """The mean of what the workers sent as -s, 0 or s; 32 bits each way go into agreeing on s."""
    scales = wire.to_server(own_scale.reshape(1))
    scale = wire.from_server(torch.cat(scales).amax().reshape(1) if scales else torch.empty(1))
    kept = torch.rand(gradient.shape, generator=generator) * scale < gradient.abs()
    planes = signvote.pack_ternary(gradient * kept)
    received = wire.to_server(planes)
    numel, workers = gradient.numel(), wire.size
    words = torch.empty(num_level_words(numel, workers), dtype=torch.int64)
    if received:
        total = sum(signvote.unpack_ternary(one, numel).long() for one in received)
        assert isinstance(total, Tensor)
        words = torch.from_numpy(pack_levels(total.numpy(), workers))
    levels = unpack_levels(wire.from_server(words).numpy(), numel, workers)
    mean = torch.from_numpy(levels).float() * (scale / workers)
    return Exchange(mean, signvote.unpack_ternary(planes, numel) * scale)


# -- Integers from -M to M as digits of numbers of 64 bits, base 2M + 1 -----------------------------------------------


def digits_per_word(workers: int) -> int:
    return int(64 / math.log2(2 * workers + 1))


def num_level_words(numel: int, workers: int) -> int:
    return -(-numel // digits_per_word(workers))


def pack_levels(levels: NDArray[np.int64], workers: int) -> NDArray[np.int64]:
    """The bits of the numbers; they are unsigned, but gloo knows no such type."""
    count = digits_per_word(workers)
    digits = np.zeros(num_level_words(len(levels), workers) * count, np.uint64)
    digits[: len(levels)] = (levels + workers).astype(np.uint64)
    return (digits.reshape(-1, count) @ _powers(workers)).view(np.int64)


def unpack_levels(words: NDArray[np.int64], numel: int, workers: int) -> NDArray[np.int64]:
    digits = words.view(np.uint64)[:, None] // _powers(workers) % np.uint64(2 * workers + 1)
    return digits.reshape(-1)[:numel].astype(np.int64) - workers


def _powers(workers: int) -> NDArray[np.uint64]:
    return np.uint64(2 * workers + 1) ** np.arange(digits_per_word(workers), dtype=np.uint64)
