"""The communication hook: pack on the thread that computes, exchange and vote on the worker thread, unpack in place."""

# No `from __future__ import annotations` here: DDP compares the hook's annotations with the classes themselves.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from signvote import _core, cuda
from signvote.ddp import trailer
from signvote.ddp.ballot import Ballot
from signvote.ddp.channel import Channel
from signvote.ddp.codec import DeviceError
from signvote.ddp.numbers import Numbers
from signvote.ddp.options import MEAN_ABS, Phase, Threshold
from signvote.ddp.plan import BucketPlan
from signvote.ddp.state import MajorityVoteState
from signvote.ddp.trailer import vote_tag

# What random numbers are drawn for.
_ZEROS, _TIES, _DITHER = range(3)


@dataclass(frozen=True)
class _Vote:
    """One bucket of one step on its way."""

    state: MajorityVoteState
    channel: Channel
    plan: BucketPlan
    step: int
    phase: Phase
    index: int
    name: str  # for errors: rank, step and bucket
    buffer: torch.Tensor
    is_last: bool


def majority_vote_hook(
    state: MajorityVoteState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """DDP communication hook: every gradient coordinate becomes ±scale, the sign for which most ranks voted.

    The exchange of a bucket runs beside the rest of the backward pass. Under the hook, pair the model with
    :class:`signvote.optim.SignSGD`.

    Args:
        state: A :class:`MajorityVoteState`, one per DDP model.
        bucket: Given by DDP. Its gradients are float32, float64, float16 or bfloat16, on the CPU or on a CUDA device,
            and are packed on the stream that is current. (What is done on a CUDA device, no GPU has run yet.)

    Returns:
        A future of the bucket's buffer, overwritten with the vote.

    Raises:
        RuntimeError: From ``backward()``, naming rank, step, bucket and phase, if another rank has died, does not
            answer within the timeout, or has other options. For gradients on a CUDA device, if signvote was built
            without its CUDA part, if the device fails, or while a CUDA graph is captured.
        TypeError, ValueError: For sparse gradients, gradients on several devices or of another dtype.

    Example::

        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(MajorityVoteState(momentum=0.9), majority_vote_hook)
    """
    _check_bucket(bucket)
    if not state.has_plan(bucket.index()):
        _check_new_bucket(bucket, state)
    channel = state.channel()
    step = state.begin(channel, bucket.index())
    phase = state.phase
    plan = state.plan(channel, bucket, phase)
    vote = _Vote(
        state=state,
        channel=channel,
        plan=plan,
        step=step,
        phase=phase,
        index=bucket.index(),
        name=state.vote_name(channel, bucket.index()),
        buffer=bucket.buffer(),
        is_last=bucket.is_last(),
    )
    _pack(vote)

    future = plan.codec.new_future()
    # Raised in a callback an error reaches the caller of backward() whole; Future.set_exception would lose its text.
    returned = future.then(lambda done: _unpack(vote, done.value()))
    channel.submit(lambda: _exchange(vote, future, returned))
    return returned


def attach(
    ddp: DistributedDataParallel, *, state: MajorityVoteState | None = None, **options: Any
) -> MajorityVoteState:
    """Register :func:`majority_vote_hook` on ``ddp`` and return its state, which knows the parameters' names.

    Args:
        ddp: A DDP model with no hook registered yet.
        state: One that was unpickled, to go on with. Default: a new one.
        **options: Of the new state, as :class:`MajorityVoteState`; ``process_group`` is that of ``ddp``.

    Example::

        ddp = DistributedDataParallel(model)
        state = attach(ddp, momentum=0.9)
        optimizer = SignSGD(ddp.parameters(), lr=1e-4)
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"attach: ddp: expected a DistributedDataParallel, got {type(ddp).__name__}")
    if state is not None and options:
        raise TypeError(f"attach: state and {', '.join(options)}: expected one or the other: a state has its options")
    if getattr(ddp, "skip_all_reduce_unused_params", False):
        raise ValueError(
            "attach: ddp: expected skip_all_reduce_unused_params=False: a backward pass that leaves out buckets cannot "
            "be told from the next"
        )
    group = None if ddp.process_group is dist.group.WORLD else ddp.process_group
    if state is None:
        state = MajorityVoteState(group, **options)
    elif group is not None:
        state.process_group = group
    if state.options.votes_on_device:
        _check_alone(ddp)
    state.name_parameters(ddp.module.named_parameters())
    ddp.register_comm_hook(state, majority_vote_hook)
    return state


def _check_alone(ddp: DistributedDataParallel) -> None:
    """That nothing of ``ddp`` uses NCCL beside the votes: two groups that do can wait for each other for ever."""
    found = [option for option in ("find_unused_parameters", "static_graph") if getattr(ddp, option)]
    found += [f"{name}: SyncBatchNorm" for name, module in ddp.module.named_modules() if type(module) is SyncBatchNorm]
    if found:
        raise ValueError(
            f"attach: ddp: expected nothing that sends during the backward pass with backend='nccl', got "
            f"{', '.join(found)}: two groups that use NCCL at the same time can wait for each other for ever"
        )


def _check_bucket(bucket: object) -> None:
    if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
        raise TypeError(
            f"majority_vote_hook: bucket: expected a GradBucket, got {type(bucket).__name__}: torch.compile with "
            'optimize_ddp="python_reducer" calls hooks in its own way; use torch._dynamo.config.optimize_ddp = '
            '"ddp_optimizer"'
        )
    buffer = bucket.buffer()
    if buffer.layout != torch.strided:
        raise TypeError(
            f"majority_vote_hook: bucket {bucket.index()}: expected dense gradients, got {buffer.layout}: "
            "set sparse=False on the embedding"
        )
    if buffer.is_cuda:
        cuda.module_for("majority_vote_hook", f"bucket {bucket.index()}", buffer.device)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"majority_vote_hook: bucket {bucket.index()}: expected a backward pass outside of CUDA graphs, got "
                "one that is being captured: a graph has no place for what the CPU exchanges between ranks"
            )
    elif buffer.device.type != "cpu":
        raise ValueError(
            f"majority_vote_hook: bucket {bucket.index()}: expected gradients on the CPU or on a CUDA device, got "
            f"{buffer.device}"
        )


def _check_new_bucket(
    bucket: dist.GradBucket,  # type: ignore[name-defined]
    state: MajorityVoteState,
) -> None:
    if state.options.votes_on_device and not bucket.buffer().is_cuda:
        raise ValueError(
            f"majority_vote_hook: bucket {bucket.index()}: expected gradients on a CUDA device with backend='nccl', "
            f"got {bucket.buffer().device}"
        )
    for parameter in bucket.parameters():
        if parameter.is_complex():  # DDP shows its gradient as twice as many real numbers
            raise TypeError(
                f"majority_vote_hook: bucket {bucket.index()}: expected real parameters, got {parameter.dtype}"
            )


def _pack(vote: _Vote) -> None:
    state, plan = vote.state, vote.plan
    try:
        plan.codec.pack(vote.buffer, plan.momentum, _ballot(vote), is_last=vote.is_last)
    except DeviceError as error:
        _fail(vote, error)
    state.counters.coordinates += plan.layout.voted_numel


def _ballot(vote: _Vote) -> Ballot:
    options, loss_scale = vote.state.options, vote.state.loss_scale
    draw = options.seed, vote.step, vote.channel.rank
    threshold = options.threshold
    if threshold is not None and not (threshold.is_relative or options.has_momentum):
        threshold = Threshold(threshold.value * loss_scale, is_relative=False)
    return Ballot(
        coefficients=options.coefficients(vote.phase, loss_scale),
        zeros=options.zeros,
        seed=_derive(_ZEROS, *draw),
        threshold=threshold,
        dither=vote.state.dither,
        dither_seed=lambda place: _derive(_DITHER, *draw, place),
        has_magnitudes=vote.plan.numbers.magnitudes > 0,
        is_finite_only=options.nonfinite == "ignore",
    )


def _fail(vote: _Vote, error: Exception) -> NoReturn:
    """Raise ``error`` under the name of ``vote``; later votes raise it too."""
    vote.state.fail(f"{vote.name}: {error}")
    raise RuntimeError(f"{vote.name}: {error}") from error


def _finish_message(vote: _Vote) -> None:
    """Put numbers and the trailer behind the words."""
    state, plan = vote.state, vote.plan
    packed = plan.codec.packed()
    ends = plan.exchange.sent.ends
    if plan.numbers.size:
        plan.sent.numbers_of(ends)[:] = _numbers(vote, packed.magnitudes)
    trailer.Sent(
        nonfinite=packed.nonfinite,
        first_rank=vote.channel.rank + 1 if packed.nonfinite else 0,
        weight=state.weight,
        tag=vote_tag(vote.step, vote.index, plan.layout.numel),
    ).write(ends.numpy())
    state.counters.zeros += packed.zeros


def _numbers(vote: _Vote, magnitudes: Numbers) -> Numbers:
    """What this rank sends."""
    plan = vote.plan
    numbers = np.zeros(plan.numbers.size, np.float32)
    progress, sent_magnitudes, agreements = plan.numbers.split(numbers)
    if progress.size:
        progress[:] = vote.state.switching.own()
    sent_magnitudes[:] = magnitudes
    if agreements.size:
        agreements[:] = vote.state.agreement_rates.own(plan.voted_places)
    return numbers


def _exchange(vote: _Vote, future: "torch.futures.Future[Any]", returned: "torch.futures.Future[Any]") -> None:
    """On the worker thread: fulfil ``future`` with None, or with the message of the error to raise.

    That calls back :func:`_unpack`, which fulfils ``returned``.
    """
    state = vote.state
    try:
        with vote.plan.codec.on_worker():
            try:
                vote.plan.codec.settle()  # also after a failure: only then may the memory go in which it packs
                if state.failure is None:
                    _finish_message(vote)
                    vote.plan.begin_vote(_derive(_TIES, state.options.seed, vote.step))
                    vote.plan.exchange.run(vote.channel, vote.plan.voter)
            except Exception as error:
                state.fail(f"{vote.name}: {error}")
            future.set_result(state.failure)
    except Exception as error:  # of the device, before the callback: the backward pass must not wait for ever
        state.fail(f"{vote.name}: {error}")
        if not returned.done():
            returned.set_result(state.failure)  # DDP raises an error of its own, which quotes what is not a tensor


def _unpack(vote: _Vote, failure: str | None) -> torch.Tensor:
    state, plan, counters = vote.state, vote.plan, vote.state.counters
    if failure is not None:
        raise RuntimeError(failure)
    result = trailer.read(plan.exchange.result.ends.numpy())
    if result.tag != vote_tag(vote.step, vote.index, plan.layout.numel):
        state.fail(f"{vote.name}: vote: ranks are out of step: not all sent this bucket of this step")
        raise RuntimeError(state.failure)
    counters.voted += plan.layout.voted_numel
    counters.ties += result.undecided
    counters.nonfinite += result.nonfinite
    if state.is_aborted:
        raise RuntimeError(f"{vote.name}: an earlier bucket of this step has raised")
    if result.nonfinite and state.options.nonfinite == "raise":
        state.is_aborted = True
        raise RuntimeError(
            f"signvote: step {vote.step}, bucket {vote.index}: {result.nonfinite} gradient coordinates are NaN or inf, "
            f"the lowest rank that has any is {result.first_rank - 1}"
        )
    try:
        scale = _learn(vote)
        is_filled = result.nonfinite > 0 and state.options.nonfinite == "propagate"
        if state.switching.needs_progress and not vote.phase.is_dense:
            dot = None if is_filled else plan.codec.progress(vote.buffer)
            stepped = plan.layout.voted_numel - (result.undecided if plan.result.num_planes == 2 else 0)
            state.switching.add(dot, stepped, state.loss_scale)
        if is_filled:
            plan.codec.fill(vote.buffer, torch.nan)
        else:
            plan.codec.unpack(vote.buffer, scale=scale)
        plan.codec.hand_over()
    except DeviceError as error:
        _fail(vote, error)
    return vote.buffer


def _learn(vote: _Vote) -> float | Sequence[float]:
    """What the numbers say that came back; returns the scale of the vote."""
    state, plan, scale = vote.state, vote.plan, vote.state.options.scale
    if plan.numbers.agreements:
        sent, result = plan.exchange.sent.words.cpu(), plan.exchange.result.words.cpu()
        state.agreement_rates.compare(plan.sent, plan.result, sent, result)
    if plan.numbers.size:
        learned = plan.result.numbers_of(plan.exchange.result.ends)[0]
        progress, magnitudes, agreements = plan.numbers.split(learned)
        if progress.size:
            state.switching.learn(*progress.tolist())
        if agreements.size:
            state.agreement_rates.learn(plan.voted_places, agreements)
        if scale == MEAN_ABS:
            return [float(magnitude) for magnitude in magnitudes]
    # A rank's own: its scaler divides by that.
    return state.loss_scale if isinstance(scale, str) else scale


def _derive(purpose: int, seed: int, *parts: int) -> int:
    """A seed for one purpose: equal parts give equal draws, other parts independent ones."""
    for part in (purpose, *parts):
        seed = _core.mix((_core.mix(seed) + part) % 2**64)
    return seed
