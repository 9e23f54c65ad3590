"""What the votes of one bucket have in common, until DDP changes the bucket: layouts, buffers, who votes on what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from signvote.ddp.codec import Codec, Layouts
from signvote.ddp.cpu_codec import CpuCodec
from signvote.ddp.cuda_codec import CudaCodec, DeviceMessagesCodec, Streams
from signvote.ddp.cuda_voter import CudaVoter
from signvote.ddp.layout import CPU, BucketLayout, MessageLayout
from signvote.ddp.numbers import NumbersLayout
from signvote.ddp.options import MEAN_ABS, Phase, VoteOptions
from signvote.ddp.stats import Counters
from signvote.ddp.topology import Exchange, chosen, new_exchange, num_shards
from signvote.ddp.voter import Voter


@dataclass
class BucketPlan:
    """One bucket's way through a step.

    Attributes:
        phase: As planned.
        momentum: Flat, in the order of the bucket's buffer.
    """

    parameters: list[torch.Tensor]
    dtype: torch.dtype
    phase: Phase
    layout: BucketLayout
    sent: MessageLayout
    result: MessageLayout
    numbers: NumbersLayout
    exchange: Exchange
    codec: Codec
    voter: Voter
    momentum: torch.Tensor | None

    @property
    def voted_places(self) -> list[int]:
        return [part.place for part in self.layout.voted]

    def begin_vote(self, seed: int) -> None:
        """The next vote takes its coins from ``seed``."""
        self.voter.begin(seed, self.codec.num_threads_of_worker)

    def fits(self, parameters: list[torch.Tensor], dtype: torch.dtype, phase: Phase) -> bool:
        return (
            self.phase is phase.as_planned
            and self.dtype == dtype
            and len(self.parameters) == len(parameters)
            and all(ours is theirs for ours, theirs in zip(self.parameters, parameters, strict=True))
        )


class BucketPlans:
    """Those of all buckets of a model, as DDP shows them; all on one device.

    Attributes:
        streams: Of that device if it is a CUDA device.
    """

    def __init__(self) -> None:
        self.streams: Streams | None = None
        self._device: torch.device | None = None
        self._plans: dict[int, BucketPlan] = {}

    def clear(self) -> None:
        """Let go of the buckets' memory, and of the device that they were on."""
        self._plans.clear()
        self._device = self.streams = None

    def __contains__(self, index: int) -> bool:
        return index in self._plans

    def __iter__(self) -> Iterator[BucketPlan]:
        return iter(self._plans.values())

    def use_device(self, index: int, device: torch.device) -> None:
        """Bucket ``index`` is on ``device``."""
        if self._device is None:
            self._device = device
            self.streams = Streams.of(device) if device.type == "cuda" else None
        elif device != self._device:
            raise ValueError(
                f"majority_vote_hook: bucket {index}: expected gradients on {self._device}, as before, got {device}: "
                "all gradients of a state are on one device; use one process for each device"
            )

    def find(self, index: int, parameters: list[torch.Tensor], dtype: torch.dtype, phase: Phase) -> BucketPlan | None:
        """The plan of bucket ``index``, if DDP and the phase have left the bucket as it was."""
        plan = self._plans.get(index)
        if plan is not None and not plan.fits(parameters, dtype, phase):
            self._plans.clear()  # the buckets were rebuilt, or laid out for votes: the others are out of date too
            return None
        return plan

    def add(self, index: int, plan: BucketPlan) -> None:
        self._plans[index] = plan


def new_plan(
    options: VoteOptions,
    parameters: list[torch.Tensor],
    places: list[int],
    buffer: torch.Tensor,
    phase: Phase,
    *,
    excluded: frozenset[int],
    has_progress: bool,
    momentum: torch.Tensor | None,
    rank: int,
    size: int,
    counters: Counters,
    streams: Streams | None,
    implementation: str | None,
) -> BucketPlan:
    """The plan of a bucket of ``parameters``, which are at ``places`` in the model, and ``buffer``.

    Args:
        excluded: Places of parameters of which the mean is taken.
        has_progress: Whether the bucket's messages carry sᵀg.
        momentum: None if nothing of the bucket has any, or it is not kept up.
    """
    numels = [parameter.numel() for parameter in parameters]
    dense = frozenset(places) if phase.is_dense else excluded.intersection(places)
    itemsize = torch.finfo(buffer.dtype).bits // 8
    num_dense = sum(numel for numel, place in zip(numels, places, strict=True) if place in dense)
    bits = (2 if options.abstains else 1) * (sum(numels) - num_dense) + 8 * itemsize * num_dense
    topology = chosen(options.topology, bits, size)
    shards = num_shards(topology, size)
    layout = BucketLayout(numels, places, shards, dense=dense, itemsize=itemsize)
    num_voted = len(layout.voted)
    numbers = NumbersLayout(
        progress=2 if has_progress else 0,
        magnitudes=num_voted if options.scale == MEAN_ABS else 0,
        agreements=2 * num_voted if options.track_agreement else 0,
    )
    sent = MessageLayout(layout, 2 if options.abstains else 1, numbers.size)
    result = sent if options.can_be_zero == options.abstains else MessageLayout(layout, 2, numbers.size)
    kept = sent
    if phase.is_dense and momentum is not None:
        kept = MessageLayout(BucketLayout(numels, places, 1, dense=excluded))
    exchange = new_exchange(topology, sent, result, rank, size, buffer.device if options.votes_on_device else CPU)
    voter: Voter
    if options.votes_on_device and exchange.shard is not None:
        voter = CudaVoter(sent, result, exchange.shard, size, buffer.dtype, options, counters, buffer.device)
    else:
        voter = Voter(sent, result, exchange.shard, size, buffer.dtype, options, counters, implementation)
    layouts = Layouts(sent, result, kept)
    codec: Codec
    if streams is None:
        codec = CpuCodec(layouts, exchange, counters, implementation)
    else:
        of_messages = DeviceMessagesCodec if options.votes_on_device else CudaCodec
        codec = of_messages(buffer, layouts, exchange, counters, streams)
    return BucketPlan(
        parameters=parameters,
        dtype=buffer.dtype,
        phase=phase.as_planned,
        layout=layout,
        sent=sent,
        result=result,
        numbers=numbers,
        exchange=exchange,
        codec=codec,
        voter=voter,
        momentum=momentum,
    )
