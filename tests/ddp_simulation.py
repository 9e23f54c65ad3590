"""Majority vote in one process, parameter by parameter, from the NumPy reference: what the hook must equal bit for bit.

It knows nothing of buckets, shards or topologies, so it also says that none of them shows in the result.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import reference
from signvote.ddp.options import VoteOptions

ZEROS, TIES = range(2)


def derive(seed: int, *parts: int) -> int:
    for part in parts:
        seed = reference.mix((reference.mix(seed) + part) % 2**64)
    return seed


class Simulation:
    """``names`` are those of all parameters of the model, frozen ones too: a parameter's place is its index there."""

    def __init__(self, world: int, names: Sequence[str], **options: Any) -> None:
        self.world, self.names, self.options = world, list(names), VoteOptions(**options)
        self.momentum: list[dict[str, reference.Floats]] = [{} for _ in range(world)]
        self.step = 0

    def vote(self, gradients: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The voted gradient of each parameter, given the flat gradients of every rank."""
        self.step += 1
        return {
            name: self._vote_parameter(place, name, [gradient[name] for gradient in gradients])
            for place, name in enumerate(self.names)
            if name in gradients[0]
        }

    def _vote_parameter(self, place: int, name: str, gradients: list[torch.Tensor]) -> torch.Tensor:
        options, dtype, numel = self.options, gradients[0].dtype, gradients[0].numel()
        words = []
        for rank, gradient in enumerate(gradients):
            # float32 holds every bfloat16
            x = (gradient.float() if dtype == torch.bfloat16 else gradient).numpy()
            seed = reference.run_seed(derive(options.seed, ZEROS, self.step, rank), place)
            if options.has_momentum:
                wide = np.float64 if dtype == torch.float64 else np.float32
                momentum = self.momentum[rank].get(name, np.zeros(numel, wide))
                packed, self.momentum[rank][name], _, _ = reference.pack_momentum(
                    x, momentum, options.coefficients, options.zeros, seed
                )
            else:
                packed, _, _ = reference.pack_signs(x, options.zeros, seed)
            words.append(packed)
        seed = reference.run_seed(derive(options.seed, TIES, self.step), place)
        voted, _ = reference.majority_vote(words, numel, options.ties, seed)
        return torch.from_numpy(reference.unpack_signs(voted, numel, np.float64(options.scale))).to(dtype)
