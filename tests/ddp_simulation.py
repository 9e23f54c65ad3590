"""Majority vote in one process, parameter by parameter, from the NumPy reference: what the hook must equal bit for bit.

It knows nothing of buckets, shards or topologies, so it also says that none of them shows in the result.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

import reference
from signvote.ddp.options import VoteOptions

ZEROS, TIES, DITHER = range(3)


def derive(seed: int, *parts: int) -> int:
    for part in parts:
        seed = reference.mix((reference.mix(seed) + part) % 2**64)
    return seed


def wide(dtype: torch.dtype) -> Any:
    """That of momentum and sums."""
    return np.float64 if dtype == torch.float64 else np.float32


class Simulation:
    """``names`` are those of all parameters of the model, frozen ones too: a parameter's place is its index there.

    ``exclude`` are names; ``weights`` those of the ranks; ``devices`` those of ranks 0, 1, ..., over and over, which
    draw the noise: each kind draws its own; ``loss_scale`` what a GradScaler multiplies the loss by in a step;
    ``switch`` the step from which on the mean is taken.
    """

    def __init__(
        self,
        world: int,
        names: Sequence[str],
        *,
        exclude: Collection[str] = (),
        weights: Sequence[int] = (),
        devices: Sequence[str] = ("cpu",),
        loss_scale: Callable[[int], float] | None = None,
        switch: float = math.inf,
        **options: Any,
    ) -> None:
        if loss_scale is not None:
            options["scale"] = "loss scale"
        self.world, self.names, self.options = world, list(names), VoteOptions(**options)
        self.exclude, self.switch = exclude, switch
        self.weights = list(weights) or [1] * world
        self.devices = [devices[rank % len(devices)] for rank in range(world)]
        self.loss_scale = loss_scale or (lambda step: 1.0)
        self.momentum: list[dict[str, reference.Floats]] = [{} for _ in range(world)]
        self.step = 0

    def vote(self, gradients: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The voted gradient of each parameter, given the flat gradients of every rank."""
        self.step += 1
        return {
            name: self._outcome(place, name, [gradient[name] for gradient in gradients])
            for place, name in enumerate(self.names)
            if name in gradients[0]
        }

    def _outcome(self, place: int, name: str, gradients: list[torch.Tensor]) -> torch.Tensor:
        dtype = gradients[0].dtype
        if not gradients[0].numel():
            return gradients[0]
        # float32 holds every bfloat16
        xs = [(gradient.float() if dtype == torch.bfloat16 else gradient).numpy() for gradient in gradients]
        is_excluded = name in self.exclude
        if is_excluded or self.step <= self.options.dense_steps or self.step >= self.switch:
            if not is_excluded and self.step < self.switch:
                for rank, x in enumerate(xs):
                    self._value(rank, name, x, wide(dtype))
            return self._mean(xs, dtype)
        if self.options.can_be_zero:
            return self._ternary_vote(place, name, xs, dtype)
        return self._vote(place, name, xs, dtype)

    def _mean(self, xs: list[reference.Floats], dtype: torch.dtype) -> torch.Tensor:
        total = np.zeros(xs[0].shape, wide(dtype))
        for x, weight in zip(xs, self.weights, strict=True):
            total += x.astype(total.dtype) * total.dtype.type(weight)
        return torch.from_numpy(total / total.dtype.type(sum(self.weights))).to(dtype)

    def _coefficients(self) -> tuple[float, float, float, float]:
        momentum = self.options.momentum
        send, keep = momentum if isinstance(momentum, tuple) else (momentum, momentum)
        if self.step <= self.options.dense_steps:
            send = keep
        elif self.step <= int(self.options.warmup_steps):
            send = 0.0
        scale = self.loss_scale(self.step)
        return send, (1 - send) / scale, keep, (1 - keep) / scale

    def _value(self, rank: int, name: str, x: reference.Floats, dtype: Any) -> reference.Floats:
        """What would be sent; momentum is replaced."""
        if not self.options.has_momentum:
            return x
        before = self.momentum[rank].get(name, np.zeros(x.size, dtype))
        coefficients = self._coefficients()
        _, sent, _, _ = reference.pack_momentum(x, before, coefficients[:2] * 2)
        _, self.momentum[rank][name], _, _ = reference.pack_momentum(x, before, coefficients[2:] * 2)
        return sent

    def _disturbed(self, rank: int, place: int, value: reference.Floats, dtype: Any) -> reference.Floats:
        """With noise; and 0 where it is below a threshold that is relative to the root mean square."""
        options = self.options
        threshold = options.threshold
        sigma = options.dither_at(self.step)
        is_relative = threshold is not None and threshold.is_relative
        if not (sigma or is_relative):
            return value
        value = value.astype(dtype)
        finite = np.where(np.isfinite(value), value, 0).astype(np.float64)
        rms = np.sqrt(np.sum(finite**2)) / value.size**0.5
        if sigma:
            device = self.devices[rank]
            generator = torch.Generator(device).manual_seed(derive(options.seed, DITHER, self.step, rank, place))
            of_torch = torch.float64 if dtype is np.float64 else torch.float32
            noise = torch.randn(value.size, dtype=of_torch, device=device, generator=generator)
            value = value + noise.cpu().numpy() * dtype(sigma * rms)
        if threshold is not None and is_relative:
            value = np.where(np.abs(value) <= dtype(threshold.value * rms), dtype(0), value)
        return value

    def _vote(self, place: int, name: str, xs: list[reference.Floats], dtype: torch.dtype) -> torch.Tensor:
        options, numel = self.options, xs[0].size
        ballots = []
        for rank, x in enumerate(xs):
            seed = reference.run_seed(derive(options.seed, ZEROS, self.step, rank), place)
            if options.has_momentum and not options.dither_at(self.step):
                before = self.momentum[rank].get(name, np.zeros(numel, wide(dtype)))
                packed, self.momentum[rank][name], _, _ = reference.pack_momentum(
                    x, before, self._coefficients(), options.zeros, seed
                )
            else:
                value = self._disturbed(rank, place, self._value(rank, name, x, wide(dtype)), wide(dtype))
                packed, _, _ = reference.pack_signs(value, options.zeros, seed)
            ballots.append((packed, self.weights[rank]))
        seed = reference.run_seed(derive(options.seed, TIES, self.step), place)
        counts = reference.counts(ballots, numel)
        voted, _ = reference.decide(counts, sum(self.weights), options.ties, seed)
        scale = self._scale(xs, dtype)
        return torch.from_numpy(reference.unpack_signs(voted, numel, np.float64(scale))).to(dtype)

    def _ternary_vote(self, place: int, name: str, xs: list[reference.Floats], dtype: torch.dtype) -> torch.Tensor:
        options, numel = self.options, xs[0].size
        lead = np.zeros(numel, np.int64)
        for rank, x in enumerate(xs):
            value = self._disturbed(rank, place, self._value(rank, name, x, wide(dtype)), wide(dtype))
            if options.abstains:
                assert options.threshold is not None
                threshold = options.threshold.value
                if options.threshold.is_relative:
                    threshold = 0.0
                elif not options.has_momentum:
                    threshold *= self.loss_scale(self.step)
                planes, _, _ = reference.pack_ternary(value, threshold)
                ballot = np.where(x == 0, 0, reference.ternary_of(planes, numel))
            else:
                seed = reference.run_seed(derive(options.seed, ZEROS, self.step, rank), place)
                packed, _, _ = reference.pack_signs(value, options.zeros, seed)
                ballot = np.where(reference.bits_of(packed, numel), 1, -1)
            lead += self.weights[rank] * ballot
        quorum: float = options.quorum
        if isinstance(quorum, float):
            quorum *= sum(self.weights)
        result = np.where(np.abs(lead) < quorum - 1e-6, 0, np.sign(lead))
        return torch.from_numpy(result * np.float64(self._scale(xs, dtype))).to(dtype) + 0.0

    def _scale(self, xs: list[reference.Floats], dtype: torch.dtype) -> float:
        if self.options.scale == "mean_abs":
            means = [np.float32(np.abs(x.astype(np.float64)).sum() / x.size) for x in xs]
            total = sum(np.float64(mean) * weight for mean, weight in zip(means, self.weights, strict=True))
            return float(np.float32(total / sum(self.weights)))
        if self.options.has_loss_scale:
            return self.loss_scale(self.step)
        return float(self.options.scale)
