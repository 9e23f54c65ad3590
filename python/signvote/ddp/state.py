"""The state of the hook: options, each parameter's momentum, the step, and how they are saved."""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal, SupportsIndex, overload

import torch
import torch.distributed as dist

from signvote.ddp import checkpoint
from signvote.ddp.advice import Advice
from signvote.ddp.agreement import WIRE_VERSION, DisagreementError, check_agreement, short_list
from signvote.ddp.agreement_rates import AgreementRates
from signvote.ddp.binding import Binding
from signvote.ddp.channel import Channel
from signvote.ddp.exclude import Exclude
from signvote.ddp.hybrid import CalibratedSwitch
from signvote.ddp.momentum import MomentumByPlace
from signvote.ddp.options import LOSS_SCALE, MEAN_ABS, Phase, VoteOptions
from signvote.ddp.parameters import Parameters
from signvote.ddp.plan import BucketPlan, BucketPlans, new_plan
from signvote.ddp.stats import Counters, ParameterStats, VoteStats
from signvote.ddp.switching import Switching
from signvote.ddp.trailer import MAX_WEIGHT


class MajorityVoteState:
    """State of :func:`majority_vote_hook`: Signum with majority vote (Bernstein et al. 2018, Algorithms 2 and 3).

    Build it before or after the process group, one per DDP model; it binds to the group in the first backward pass,
    where all ranks check that their options agree. It can be pickled; a ``process_group`` must then be given anew.

    Memory per coordinate: 4 bytes of momentum (8 for float64, none with ``momentum=0.0``) and, for messages between M
    ranks, 3 bits if ``"sharded"``, M + 2 bits if ``"allgather"``, and if ``"server"`` 2 bits, on rank 0 two more
    and as many as M has in base 2. With abstention it is twice as much and, with momentum or noise, two bits more;
    where the mean is taken, 32 times as much (for float32). Weights, and ``ties="zero"`` without abstention, count
    votes one after another, in as many bits more as their sum has in base 2. From the second step on nothing of that
    size is allocated, apart from what gloo itself needs for a collective, and a copy of each bucket in turn with noise
    or a relative threshold.

    If the gradients are on a CUDA device, so are the momentum and 2.4 more bits: what is packed, what was voted and
    tables of where they lie, of which the hook does not need those for votes on the device (0.1 bits). The messages
    that this rank packs and unpacks are then in pinned host memory, whose blocks torch rounds up to powers of two; what
    it receives from others is not pinned. With ``backend="nccl"`` all messages are on the device instead. All gradients
    of a state are on one device. (No GPU has run it yet.)

    Args:
        process_group: The ranks that vote. Default: all. A group of its own is made over the same ranks, so the backend
            of this one does not matter.
        momentum: β of Signum, m ← β·m + (1 - β)·g, and sign(m) is sent. 0.0 is signSGD. A pair ``(β1, β2)`` is the
            Lion rule: sign(β1·m + (1 - β1)·g) is sent, m ← β2·m + (1 - β2)·g is kept. Every rank has its own momentum,
            float32 (float64 for float64 parameters).
        zeros: The bit of a coordinate that is exactly zero: ``"coin"`` (a reproducible coin, different on each rank,
            so that nothing drifts), ``"positive"`` or ``"negative"``.
        ties: The result where as many ranks say + as -: ``"coin"`` (the same on all ranks), ``"positive"``,
            ``"negative"``, or ``"zero"``, for which the vote takes two bits on its way back.
        scale: The gradient that comes out is ±scale. ``"mean_abs"``: for each parameter the mean absolute gradient, a
            mean over its coordinates and over the ranks, so that gradient norms, clipping and Adam keep their meaning.
            A ``GradScaler``: the factor by which it has multiplied the loss, so that ±1 is left when it has unscaled
            the gradients; momentum is then that of the unscaled gradients. It is not saved, and on a CUDA device asking
            it waits for the device once in a step.
        topology: ``"sharded"`` (every rank is the server of one shard), ``"allgather"`` (every rank votes on
            everything), ``"server"`` (rank 0 is the server) or ``"auto"`` (``"allgather"`` between two ranks, and for
            buckets so small that a rank sends at most 16 KiB more than if ``"sharded"``, because it has one phase and
            not two; otherwise ``"sharded"``). All give the same bits.
        nonfinite: What a NaN or inf on any rank does: ``"propagate"`` fills the bucket with NaN on all ranks, which
            is what ``GradScaler`` looks for; ``"raise"`` raises on all ranks; ``"ignore"`` votes on.
        abstain: Majority vote with abstention (Bernstein et al. 2018, section 6), of two bits each way. True: a rank
            has no vote on a coordinate where its gradient, or what it would send, is exactly zero. A number: nor where
            what it would send is no larger than that. ``"rms:0.1"``: no larger than 0.1 times the root mean square of
            what it would send for the parameter. A coordinate on which nobody votes becomes 0 and does not move: rows
            of an embedding, unused parameters, and ranks that have joined.
        quorum: By how many votes one sign must lead, otherwise the coordinate becomes 0: an integer, or a float, the
            share of all ranks' votes (1.0: all agree). With a quorum other than the integer 1 ties are zero. Where it
            is more than all votes nothing moves.
        warmup_steps: Steps, from the first, in which momentum is kept up and the signs of the gradients are sent:
            the warm-up of Theorem 3. ``"theory"``: as many as it asks for, see
            :func:`signvote.optim.signum_warmup_steps`.
        dense_steps: Steps, from the first, in which the mean of the gradients in full precision takes the place of the
            vote, while momentum is kept up.
        exclude: Parameters of which the mean is taken instead of the vote, within the same messages: names, patterns,
            functions of name and parameter, see :func:`signvote.ddp.exclude.resolve`. The state must know the
            parameters' names (:func:`attach` tells it). The mean is that of float32 (float64 for float64) sums in the
            order of the ranks: the same bits on all of them.
        dither: Standard deviation of Gaussian noise that is added before the sign, relative to the root mean square
            of what is sent for the parameter; or a function of the step, from 1 on, that returns it. A remedy where
            ranks have different data: the vote's expectation then grows with the mean (Chen et al. 2020). Each rank
            draws its own, from the seed, the step and the parameter's place: a resumed job draws the same on a device
            of the same kind.
        track_agreement: Whether ``stats(per_parameter=True)`` can tell how far the ranks agree; two numbers per
            parameter travel with the vote.
        backend: What messages travel by: ``"gloo"``, between the hosts, or ``"nccl"``, between CUDA devices, one for
            each rank, where they are then voted on. Nothing else may use NCCL during the backward pass: not DDP with
            ``find_unused_parameters`` or ``static_graph``, no ``SyncBatchNorm`` (:func:`attach` refuses these), nor a
            second model. Not for ``topology="server"``, a ``weight`` other than 1, or an ``implementation``;
            ``track_agreement`` copies all messages to the host. That a rank has died shows when the timeout is over.
            (No GPU has run it yet.)
        weight: This rank's vote counts as so many, 1 to 65535: for batches or machines of unequal size. It need not be
            the same on all ranks, and may be set anew between steps (``state.weight``). Means are weighted as well. Not
            saved by ``state_dict``.
        seed: Seed of the coins and of the noise.
        timeout: How long a rank waits for another before it raises. Default: the timeout of ``process_group``.
        implementation: The CPU's kernels to use, see :func:`signvote.implementations`. Default: the best.

    Raises:
        ValueError: If an option has a value that is not listed here.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        momentum: float | tuple[float, float] = 0.9,
        zeros: str = "coin",
        ties: str = "coin",
        scale: float | str | torch.amp.GradScaler = 1.0,
        topology: str = "sharded",
        nonfinite: str = "propagate",
        abstain: bool | float | str = False,
        quorum: int | float = 1,
        warmup_steps: int | str = 0,
        dense_steps: int = 0,
        exclude: Exclude = None,
        dither: float | Callable[[int], float] = 0.0,
        track_agreement: bool = False,
        backend: str = "gloo",
        weight: int = 1,
        seed: int = 0,
        timeout: timedelta | None = None,
        implementation: str | None = None,
    ) -> None:
        if isinstance(scale, str) and scale == LOSS_SCALE:
            raise ValueError(f"MajorityVoteState: scale: expected the GradScaler itself, got {scale!r}")
        self.options = VoteOptions(
            momentum=momentum,
            zeros=zeros,
            ties=ties,
            scale=LOSS_SCALE if isinstance(scale, torch.amp.GradScaler) else scale,
            topology=topology,
            nonfinite=nonfinite,
            abstain=abstain,
            quorum=quorum,
            warmup_steps=warmup_steps,
            dense_steps=dense_steps,
            dither=dither,
            track_agreement=track_agreement,
            backend=backend,
            seed=seed,
        )
        if implementation is not None and self.options.votes_on_device:
            raise ValueError(
                f"MajorityVoteState: implementation: expected None with backend='nccl', got {implementation!r}: the "
                "CPU does not vote"
            )
        self.grad_scaler = scale if isinstance(scale, torch.amp.GradScaler) else None
        self.weight = weight
        self.implementation = implementation
        self.step = 0
        self.dither = 0.0  # of this step
        self.loss_scale = 1.0  # by which the gradients of this step are multiplied, as far as the hook must know
        self.counters = Counters()
        self.agreement_rates = AgreementRates()
        self.switching = Switching(None, None, None)
        self._parameters = Parameters(exclude)
        self._momentum = MomentumByPlace()
        self._binding = Binding(process_group, timeout, backend)
        self._plans = BucketPlans()
        self._last_bucket = -1
        self._advice: Advice | None = None
        # DDP stops at the first bucket that raises: those behind it must not write into gradients any more.
        self.is_aborted = False

    # -- Binding --------------------------------------------------------------------------------------------------

    def name_parameters(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Tell the state its model's parameters, so that momentum can be saved by name. :func:`attach` does it.

        Args:
            named_parameters: ``model.named_parameters()``, the same on all ranks, before the first backward pass.

        Raises:
            RuntimeError: If the hook has been called already.
            ValueError: If the state was unpickled and had other names.
        """
        self._parameters.tell(named_parameters)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that vote, None for all; to be set again after unpickling, unless they are all."""
        return self._binding.process_group

    @process_group.setter
    def process_group(self, process_group: dist.ProcessGroup | None) -> None:
        self._binding.process_group = process_group

    @property
    def timeout(self) -> timedelta | None:
        """How long a rank waits for another, None for as long as the process group says; of groups made from now on."""
        return self._binding.timeout

    @timeout.setter
    def timeout(self, timeout: timedelta | None) -> None:
        self._binding.timeout = timeout

    def channel(self) -> Channel:
        """The channel of the current process group; made in the first call, and anew if the group was destroyed.

        Raises:
            RuntimeError: If there is no process group, or if a vote has failed on it.
        """
        channel = self._binding.channel
        if channel is None:
            self._plans.clear()
            channel = self._binding.bind()
            if channel.rank == 0 and self._advice is None:
                self._give_advice(channel.size)
        if self._binding.failure is not None:
            raise RuntimeError(self._binding.failure)
        return channel

    def _give_advice(self, size: int) -> None:
        options = self.options
        self._advice = Advice(
            self._parameters.voted,
            has_momentum=options.has_momentum,
            scale=None if options.scale == MEAN_ABS else self._scale_to_step_with,
        )
        self._advice.check_world(size, "zero" if options.can_be_zero else options.ties)

    def _scale_to_step_with(self) -> float | None:
        """What the optimizer finds in the gradients, a loss scale taken out; None in steps that take the mean."""
        if self.step == 0 or self.phase.is_dense:
            return None
        return self.options.scale if isinstance(self.options.scale, float) else 1.0

    def close(self) -> None:
        """End the worker thread and the state's own group now, rather than with ``destroy_process_group()``.

        Memory for messages is freed too, momentum stays.

        For a state that is given up while training goes on. It can be used again: it then makes a new group, so all
        ranks must close it, between steps.
        """
        self._binding.close()
        self._plans.clear()

    def has_plan(self, bucket_index: int) -> bool:
        return bucket_index in self._plans

    def plan(
        self,
        channel: Channel,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
        phase: Phase,
    ) -> BucketPlan:
        """The plan of ``bucket``: made when DDP first shows it, and anew when DDP has rebuilt its buckets."""
        index, parameters, buffer = bucket.index(), bucket.parameters(), bucket.buffer()
        self._plans.use_device(index, buffer.device)
        plan = self._plans.find(index, parameters, buffer.dtype, phase)
        if plan is None:
            plan = self._new_plan(channel, index, parameters, buffer, phase)
            self._plans.add(index, plan)
            name, description = self.vote_name(channel, index), self._description(channel, index, plan)
            channel.submit(lambda: self._agree(channel, name, description))
        return plan

    def _new_plan(
        self, channel: Channel, index: int, parameters: list[torch.Tensor], buffer: torch.Tensor, phase: Phase
    ) -> BucketPlan:
        places, excluded = self._parameters.places(parameters), self._parameters.excluded
        momentum = None
        if self.options.has_momentum and phase is not Phase.SWITCHED and not excluded.issuperset(places):
            momentum = self._momentum.gather(parameters, places, buffer, without=excluded)
        return new_plan(
            self.options,
            parameters,
            places,
            buffer,
            phase,
            excluded=excluded,
            has_progress=index == 0 and not phase.is_dense and self.switching.needs_progress,
            momentum=momentum,
            rank=channel.rank,
            size=channel.size,
            counters=self.counters,
            streams=self._plans.streams,
            implementation=self.implementation,
        )

    def _description(self, channel: Channel, index: int, plan: BucketPlan) -> dict[str, Any]:
        """What all ranks must have in common before they vote on a bucket."""
        excluded = sorted(self._parameters.excluded.intersection(self._parameters.places(plan.parameters)))
        return {
            "wire version": WIRE_VERSION,
            "world size": channel.size,
            **self.options.described(),
            "step": self.step,
            "phase": self.phase.value,
            "switch to means": self.switching.described(),
            f"numel of bucket {index}": plan.layout.numel,
            f"parameters of bucket {index}": len(plan.parameters),
            f"dtype of bucket {index}": str(plan.dtype),
            f"excluded parameters of bucket {index}": short_list(excluded),
        }

    def _agree(self, channel: Channel, name: str, description: Mapping[str, Any]) -> None:
        if self.failure is None:
            try:
                check_agreement(channel, "signvote", description)
            except DisagreementError as error:
                self.fail(str(error))
            except Exception as error:
                self.fail(f"{name}: agreement: {error}")

    def vote_name(self, channel: Channel, bucket_index: int) -> str:
        return f"signvote: rank {channel.rank}, step {self.step}, bucket {bucket_index}"

    def fail(self, message: str) -> None:
        """As :meth:`signvote.ddp.binding.Binding.fail`."""
        self._binding.fail(message)

    @property
    def failure(self) -> str | None:
        return self._binding.failure

    # -- Steps and counters ---------------------------------------------------------------------------------------

    def begin(self, channel: Channel, bucket_index: int) -> int:
        """Count a call of the hook and return the step that it belongs to.

        DDP shows its buckets in order, so an index that does not grow begins a new backward pass.
        """
        if bucket_index <= self._last_bucket or self._last_bucket < 0:
            channel.wait_idle()  # only after an error does the last pass leave anything behind
            self.is_aborted = False
            self.dither = self.options.dither_at(self.step + 1)
            self.loss_scale = self._current_loss_scale()
            self.step += 1
            self.counters.steps += 1
            self.switching.begin(self.step)
        self._last_bucket = bucket_index
        self.counters.calls += 1
        return self.step

    @property
    def phase(self) -> Phase:
        """What the current step does."""
        return Phase.SWITCHED if self.switching.is_over(self.step) else self.options.phase(self.step)

    def switch_to_dense(
        self,
        at_step: int | None = None,
        *,
        rule: CalibratedSwitch | None = None,
        lr: float | Callable[[], float] | None = None,
    ) -> None:
        """Go from votes to the mean of the gradients in full precision, for good; all ranks call it, between steps.

        Either from a step on, or when a rule says so that also gives the learning rate with which SGD goes on. The hook
        cannot change the optimizer: look at :attr:`switched_at` before each step, and replace it. The switch is logged
        (logger ``signvote``), and saved with the state; ``lr`` is not: call this again before ``load_state_dict``.

        Args:
            at_step: The first step of which the mean is taken; ``state.step + 1`` is the next one.
            rule: A :class:`signvote.ddp.CalibratedSwitch`. Two numbers per step then travel with the vote. If a
                ``GradScaler`` multiplies the loss, the state must know it (``scale=scaler``): the rule is of gradients
                that it has unscaled.
            lr: With a rule, the learning rate of the sign optimizer, or a function that returns that of the current
                step.

        Raises:
            ValueError: If there is neither a step nor a rule, the step is past, or a rule comes without ``lr``.

        Example::

            state.switch_to_dense(rule=CalibratedSwitch(), lr=lambda: optimizer.param_groups[0]["lr"])
            for batch in batches:
                loss(ddp, batch).backward()
                if state.switched_at == state.step:
                    optimizer = torch.optim.SGD(ddp.parameters(), lr=state.calibrated_lr)
                optimizer.step()
        """
        if (at_step is None) == (rule is None):
            raise ValueError("switch_to_dense: expected at_step or rule, one of both")
        if at_step is not None and (isinstance(at_step, bool) or not isinstance(at_step, int) or at_step <= self.step):
            raise ValueError(f"switch_to_dense: at_step: expected an integer above {self.step}, got {at_step!r}")
        if (rule is None) != (lr is None):
            raise ValueError(f"switch_to_dense: lr: expected one with a rule and only then, got {lr!r}")
        self.switching = Switching(at_step, rule, lr)
        self._plans.clear()

    @property
    def switched_at(self) -> int | None:
        """The first step of which the mean is taken for good, once that is decided."""
        return self.switching.switched_at

    @property
    def calibrated_lr(self) -> float | None:
        """With which SGD goes on, once the rule of :meth:`switch_to_dense` has decided."""
        return self.switching.rule.learning_rate if self.switching.rule is not None else None

    @property
    def weight(self) -> int:
        """This rank's vote counts as so many; may be set between steps."""
        return self._weight

    @weight.setter
    def weight(self, weight: SupportsIndex) -> None:
        try:
            number = operator.index(weight)
        except TypeError:
            number = 0
        if isinstance(weight, bool) or not 1 <= number <= MAX_WEIGHT:
            raise ValueError(f"MajorityVoteState: weight: expected an integer from 1 to {MAX_WEIGHT}, got {weight!r}")
        if number != 1 and self.options.votes_on_device:
            raise ValueError(
                f"MajorityVoteState: weight: expected 1 with backend='nccl', got {weight!r}: votes that are counted on "
                "the device count once each"
            )
        self._weight = number

    def _current_loss_scale(self) -> float:
        """On a CUDA device this waits for it."""
        if not self.options.has_loss_scale:
            return 1.0
        if self.grad_scaler is None:
            raise RuntimeError("signvote: this state was pickled with a GradScaler: set state.grad_scaler before use")
        if not self.grad_scaler.is_enabled() or self.grad_scaler._scale is None:  # it has not scaled any loss yet
            return 1.0
        return float(self.grad_scaler.get_scale())

    @overload
    def stats(self, per_parameter: Literal[False] = False) -> VoteStats: ...

    @overload
    def stats(self, per_parameter: Literal[True]) -> dict[str, ParameterStats]: ...

    def stats(self, per_parameter: bool = False) -> VoteStats | dict[str, ParameterStats]:
        """What this rank has done so far, see :class:`VoteStats`. With ``calls`` at 0 the hook is not in use.

        Args:
            per_parameter: Instead, how far the ranks agreed on each parameter in the step before the last, by name, see
                :class:`ParameterStats`; the same on every rank. A parameter on which nobody has voted is left out.

        Raises:
            RuntimeError: With ``per_parameter``, unless the state was made with ``track_agreement=True`` and knows the
                parameters' names.
        """
        if not per_parameter:
            return self.counters.stats(self._binding.traffic)
        if not self.options.track_agreement:
            raise RuntimeError("stats: per_parameter: expected a state with track_agreement=True")
        names = self._parameters.known_names("stats")
        return {names[place]: rates for place, rates in self.agreement_rates.by_place.items()}

    # -- Saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's step, seed and momentum by parameter name, in host memory: ``weights_only=True`` loads it.

        Every rank has its own momentum: save one file per rank. Call it between steps.

        Raises:
            RuntimeError: If the parameters' names are not known (use :func:`attach`), or without a process group.
        """
        names = self._parameters.known_names("state_dict")
        rank, world_size = self._binding.rank_and_world_size("state_dict")
        return {
            "format": checkpoint.FORMAT,
            "rank": rank,
            "world_size": world_size,
            "step": self.step,
            "seed": self.options.seed,
            "parameters": names,
            "momentum": {names[place]: momentum for place, momentum in self._momentum.items()},
            "switch": self.switching.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *, reset_momentum: bool = False) -> None:
        """Continue, bit for bit, where :meth:`state_dict` of the same rank left off. All ranks load, or none.

        Args:
            state_dict: What :meth:`state_dict` returned on this rank.
            reset_momentum: Take over only the step, the seed and the switch to means, and start with zero momentum: for
                a job whose number of ranks or whose model has changed. Momentum is back after some 1/(1 - β) steps.

        Raises:
            ValueError: If it was saved by another rank or world size, for other parameters, or is not such a dict.
                Nothing is changed then.
            RuntimeError: As :meth:`state_dict`.
        """
        names = self._parameters.known_names("load_state_dict")
        checkpoint.check_format(state_dict)
        momentum: dict[int, torch.Tensor] = {}
        if not reset_momentum:
            checkpoint.check_rank(state_dict, *self._binding.rank_and_world_size("load_state_dict"))
            saved = state_dict["momentum"]
            excluded = self._parameters.excluded
            checkpoint.check_momentum(
                state_dict,
                self._parameters.shapes(),
                expects_momentum=self.options.has_momentum and len(excluded) < len(names),
                any_trained=any(parameter.requires_grad for parameter in self._parameters.voted()),
            )
            momentum = {
                place: saved[name].detach().clone()
                for place, name in enumerate(names)
                if name in saved and place not in excluded
            }
        if state_dict.get("switch") is not None:
            self.switching.load_state_dict(state_dict["switch"])
        self.options = replace(self.options, seed=state_dict["seed"])
        self.step = state_dict["step"]
        self._momentum = MomentumByPlace(momentum)
        self.agreement_rates = AgreementRates()
        self._plans.clear()
        self._last_bucket = -1

    def __getstate__(self) -> dict[str, Any]:
        """All but what lives in this process: the group, the thread, the buckets, the identity of the parameters."""
        momentum = dict(self._momentum.items())
        if momentum and self._parameters.names is None:
            raise RuntimeError(
                "MajorityVoteState: a state whose parameters have no names cannot be pickled in training: nothing "
                "would tell whose momentum is whose; use attach(ddp)"
            )
        return {
            "options": {**self.options.as_dict(), "weight": self.weight, "exclude": self._parameters.exclude_to_save()},
            "timeout": self.timeout,
            "implementation": self.implementation,
            "has_group": self._binding.has_group,
            "step": self.step,
            "names": self._parameters.names,
            "momentum": momentum,
            "switch": self.switching.state_dict(),
            "rule": self.switching.rule,
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        options = saved["options"]
        scale = options["scale"]
        options = {**options, "scale": 1.0 if scale == LOSS_SCALE else scale}
        self.__init__(timeout=saved["timeout"], implementation=saved["implementation"], **options)  # type: ignore[misc]
        self.options = replace(self.options, scale=scale)
        self._binding = Binding(None, saved["timeout"], self.options.backend, is_group_missing=saved["has_group"])
        self.step = saved["step"]
        self._parameters = Parameters(options["exclude"], saved["names"])
        self._momentum = MomentumByPlace(saved["momentum"])
        self.switching = Switching(None, saved["rule"], None)
        self.switching.load_state_dict(saved["switch"])

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.as_dict().items())
        return f"MajorityVoteState({options})"
