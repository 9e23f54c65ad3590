"""What a rank votes on a bucket in one step, written in the ops of whatever device the bucket is on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from signvote.ddp.layout import Part
from signvote.ddp.options import Coefficients, Threshold

#: So many coordinates are reduced at a time: torch makes a float64 copy of what it reduces in float64.
PIECE = 2**22


@dataclass(frozen=True)
class Ballot:
    """How the coordinates of a bucket become votes.

    Attributes:
        coefficients: Of momentum: for what is sent, and for what is kept.
        zeros, seed: The bit of a coordinate that is exactly zero, and the seed of its coin.
        threshold: Where a rank abstains; None: nowhere.
        dither: Standard deviation of the noise added before the sign, relative to the parameter's root mean square.
        dither_seed: Seed of the noise of the parameter at a place in the model.
        has_magnitudes: Whether the mean absolute gradient of each parameter is to be sent as well.
        is_finite_only: Whether gradients that are not finite do not count in it.
    """

    coefficients: Coefficients
    zeros: str
    seed: int
    threshold: Threshold | None
    dither: float
    dither_seed: Callable[[int], int]
    has_magnitudes: bool
    is_finite_only: bool

    @property
    def is_plain(self) -> bool:
        """Whether the ops of one bit say it all."""
        return self.threshold is None and self.dither == 0.0

    @property
    def is_relative(self) -> bool:
        return self.threshold is not None and self.threshold.is_relative


class BallotOps(ABC):
    """The ops that write votes, on one device. Those on ``scratch`` are of no interest but for what they count."""

    @abstractmethod
    def keep(self, bucket: torch.Tensor, momentum: torch.Tensor, coefficients: Coefficients) -> None:
        """Replace ``momentum``, and count what of ``bucket`` is not finite."""

    @abstractmethod
    def vote(self, x: torch.Tensor, momentum: torch.Tensor | None, ballot: Ballot) -> None:
        """The signs of ``x`` or of its momentum, which is replaced, into the message."""

    @abstractmethod
    def vote_or_abstain(self, x: torch.Tensor, threshold: float) -> None:
        """The signs of ``x``, and where it is more than ``threshold``, into the message."""

    @abstractmethod
    def abstain_at_zeros_of(self, bucket: torch.Tensor) -> None:
        """Abstain where ``bucket`` is zero, too."""


def cast(
    ops: BallotOps, bucket: torch.Tensor, momentum: torch.Tensor | None, ballot: Ballot, parts: list[Part]
) -> None:
    """Write the votes on the voted ``parts`` of ``bucket``; ``momentum`` is replaced.

    Without abstention and noise this is one op. Otherwise what would be sent is made first, as float32 (float64 for
    float64): in the momentum itself where that is what is sent, elsewhere in memory of its own.
    """
    if ballot.is_plain:
        ops.vote(bucket, momentum, ballot)
        return
    value = bucket if momentum is None else _updated(ops, bucket, momentum, ballot.coefficients)
    if ballot.dither or ballot.is_relative:
        value = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
        for part in parts:
            _disturb(part.of(value), ballot, part.place)
    if ballot.threshold is None:
        ops.vote(value, None, ballot)
        return
    ops.vote_or_abstain(value, 0.0 if ballot.is_relative else ballot.threshold.value)
    if value is not bucket:
        # A rank that has seen nothing of a coordinate in this step has no say: not by its momentum, nor by noise.
        ops.abstain_at_zeros_of(bucket)


def _updated(ops: BallotOps, bucket: torch.Tensor, momentum: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """What is to be sent of ``momentum``, which is replaced by what is to be kept."""
    send, keep = coefficients[:2] * 2, coefficients[2:] * 2
    sent = momentum if send == keep else momentum.clone()
    ops.keep(bucket, sent, send)
    if sent is not momentum:
        ops.keep(bucket, momentum, keep)
    return sent


def _disturb(x: torch.Tensor, ballot: Ballot, place: int) -> None:
    """Noise for a parameter, then zero where it is below a relative threshold. What is not finite stays so.

    The noise is that of the device's generator: the same seed gives other noise on another kind of device.
    """
    rms = _norm(x, 2, is_finite_only=True) / x.numel() ** 0.5
    if ballot.dither:
        generator = torch.Generator(x.device).manual_seed(ballot.dither_seed(place))
        noise = torch.empty_like(x).normal_(generator=generator)
        x.add_(noise.mul_((ballot.dither * rms).to(x.dtype)))
    if ballot.threshold is not None and ballot.threshold.is_relative:
        x.masked_fill_(x.abs() <= (ballot.threshold.value * rms).to(x.dtype), 0.0)


def magnitudes(bucket: torch.Tensor, parts: list[Part], ballot: Ballot) -> torch.Tensor:
    """The mean absolute value of each part, float32."""
    sums = [_norm(part.of(bucket), 1, is_finite_only=ballot.is_finite_only) / part.numel for part in parts]
    return torch.stack(sums).float()


def _norm(x: torch.Tensor, order: int, *, is_finite_only: bool) -> torch.Tensor:
    """As a float64 tensor of no dimension, without what is not finite if ``is_finite_only``."""
    norms = [
        torch.linalg.vector_norm(
            torch.nan_to_num(piece, 0.0, 0.0, 0.0) if is_finite_only else piece, order, dtype=torch.float64
        )
        for piece in torch.split(x, PIECE)
    ]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), order)
