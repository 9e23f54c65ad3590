"""Warnings, once and with the remedy, about what takes the meaning from a vote on its way to the parameters.

What happens between the vote and the optimizer's step is not the hook's to see. So the first steps of the optimizers
that hold voted parameters are looked at, through torch's hook of all optimizers.
"""

import inspect
import logging
import math
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import signvote
from signvote.optim import SignSGD, Signum

T = TypeVar("T")
_log = logging.getLogger("signvote")

# How many steps are looked at, and how many gradients in each: the smallest, as some may hold nothing but zeros.
_STEPS, _GRADIENTS = 8, 4
# A gradient in bfloat16 is this close to the scale that was asked for.
_TOLERANCE = 0.01
# Code whose caller is to be told: torch's, and signvote's.
_INSIDE = tuple(os.path.join(os.path.dirname(inspect.getfile(of)), "") for of in (torch, signvote))


class AdviceWarning(UserWarning):
    """What the hook warns of; ``warnings.filterwarnings("ignore", category=AdviceWarning)`` silences it."""


class Advice:
    """What one state has to say, each thing once.

    It looks until it has seen some steps of optimizers that hold its parameters, or until :meth:`close`. A look reads
    the largest coordinate of a few small gradients, which on a CUDA device waits for it. It keeps alive neither the
    state nor the optimizers, and does not look at what ``torch.compile`` has compiled.

    Make it on one rank only, or every rank says the same.

    Args:
        parameters: Returns the parameters on which the state votes. Of a bound method, the object is held weakly.
        has_momentum: Whether the hook has momentum.
        scale: Returns the magnitude of the votes, as an optimizer should find it, or None if there is nothing to be
            found now, as before the first vote and in dense steps. Held as ``parameters``. None: there never is, as the
            magnitude is that of the gradient.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[Tensor]],
        *,
        has_momentum: bool,
        scale: Callable[[], float | None] | None,
    ) -> None:
        self._parameters = _weakly(parameters)
        self._scale = None if scale is None else _weakly(scale)
        self._has_momentum = has_momentum
        self._steps_left = _STEPS
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._given: set[str] = set()
        _watching.add(self)
        _watch_optimizers()

    def close(self) -> None:
        """Look at no more steps."""
        _watching.discard(self)

    def check_world(self, size: int, ties: str) -> None:
        """Warn if ``size`` workers are two, and their ties, decided as ``ties`` says, are decided by a coin."""
        if size == 2 and ties == "coin":
            momentum = "" if self._has_momentum else "a momentum, "
            self._give(
                "two workers",
                'two workers tie wherever they disagree, and ties="coin" then decides by chance: half of the '
                f'coordinates, where the gradient is mostly noise. Use ties="zero", {momentum}or three workers or more',
            )

    def look(self, optimizer: Optimizer, *, has_closure: bool) -> None:
        """See what ``optimizer`` is, and what it is about to step with."""
        try:
            found = list(self._findings(optimizer, has_closure))
        except Exception:  # of an optimizer or a tensor of an unknown kind: advice must not end a training
            self.close()
            return
        for kind, text in found:
            self._give(kind, text)

    def _findings(self, optimizer: Optimizer, has_closure: bool) -> Iterator[tuple[str, str]]:
        scale = None if self._scale is None else self._scale()
        if scale is None and self._scale is not None and optimizer in self._seen:
            return
        ours = {id(parameter) for parameter in self._parameters() or ()}
        groups = [group for group in optimizer.param_groups if any(id(p) in ours for p in group["params"])]
        if not groups:
            return
        if optimizer not in self._seen:
            self._seen.add(optimizer)
            if self._has_momentum:
                yield from _momentum(optimizer, groups)
        if self._scale is not None:
            # A closure computes the gradients later: those to be seen are of the step before.
            if scale is None or (has_closure and any(group.get("nesterov") for group in groups)):
                return
            gradients = [p.grad for group in groups for p in group["params"] if id(p) in ours and p.grad is not None]
            if not gradients:
                return
            ratio = _ratio(gradients, scale)
            if ratio is not None:
                yield from _magnitude(optimizer, ratio, scale)
        self._steps_left -= 1
        if self._steps_left == 0:
            self.close()

    def _give(self, kind: str, text: str) -> None:
        if kind not in self._given:
            self._given.add(kind)
            try:
                warnings.warn(f"signvote: {text}", AdviceWarning, stacklevel=_stacklevel())
            except AdviceWarning:  # a filter makes errors of warnings: of this rank alone, and the others would wait
                _log.warning(text)


# -- What there is to find --------------------------------------------------------------------------------------------


def _momentum(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """SGD, RMSprop and Signum call it ``momentum``; of the ``betas`` of Adam, its kin and Lion, it is the first."""
    for group in groups:
        for option in ("momentum", "betas"):
            value = group.get(option, 0)
            first = value[0] if isinstance(value, tuple | list) else value
            if float(first) != 0:
                yield (
                    "momentum",
                    f"{type(optimizer).__name__} has {option}={value}, on top of the hook's momentum: it averages "
                    "votes on signs of an average, which is not Signum. Use signvote.optim.SignSGD, or momentum=0.0 in "
                    "the hook",
                )
                return


def _magnitude(optimizer: Optimizer, ratio: float, scale: float) -> Iterator[tuple[str, str]]:
    name = type(optimizer).__name__
    takes_sign = isinstance(optimizer, SignSGD | Signum)
    loss_scale = _loss_scale()
    fused = getattr(optimizer, "grad_scale", None)  # GradScaler leaves it to this optimizer to divide
    if fused is not None:
        ratio /= float(fused)
    if math.isclose(ratio, 1, rel_tol=_TOLERANCE):
        return
    if math.isclose(ratio * loss_scale, 1, rel_tol=_TOLERANCE):
        if not takes_sign:
            yield (
                "loss scale",
                f"GradScaler divides the vote of ±{scale:g}, which knows no loss scale, by {loss_scale:g}: gradients "
                f"of {name} are ±{scale * ratio:.3g}. Use signvote.optim.SignSGD, which takes the sign again, or let "
                'the hook know: MajorityVoteState(scale=scaler) or scale="mean_abs"',
            )
    elif takes_sign:
        yield (
            "clipping",
            f"gradients of {name} are ±{scale * ratio:.3g}, but the vote had left ±{scale:g}. If that is clipping, it "
            f"has no effect: {name} takes the sign, so its step is the same. Leave the clipping out",
        )
    else:
        yield (
            "clipping",
            f"gradients of {name} are ±{scale * ratio:.3g}, but the vote had left ±{scale:g}. If that is clipping, it "
            "shrinks every step, as the norm of d votes is √d whatever the gradient is. Leave the clipping out, use "
            'signvote.optim.SignSGD, whose step no scale changes, or scale="mean_abs" in the hook',
        )


def _ratio(gradients: list[Tensor], scale: float) -> float | None:
    """Of the largest coordinate to ``scale``, in a small gradient with coordinates that are finite and not all 0."""
    smallest = sorted((g for g in gradients if g.numel() > 0), key=Tensor.numel)[:_GRADIENTS]
    if not smallest:
        return None
    with torch.no_grad():
        peaks: list[float] = torch.stack([g.abs().amax().double() for g in smallest]).tolist()  # one wait for all
    return next((peak / scale for peak in peaks if 0 < peak < math.inf), None)


def _loss_scale() -> float:
    """The loss scale of the GradScaler that calls the optimizer, 1 without one."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == GradScaler.__module__:
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, GradScaler):
                return scaler.get_scale()
    return 1.0


# -- Looking ----------------------------------------------------------------------------------------------------------

_watching: weakref.WeakSet[Advice] = weakref.WeakSet()


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or not _watching:
        return
    for advice in list(_watching):
        advice.look(optimizer, has_closure=any(map(callable, (*args[1:], kwargs.get("closure")))))


def _watch_optimizers() -> None:
    """Install the hook, for good: torch walks through its hooks when it calls one, and none may be removed meanwhile.

    While nobody watches, it costs an optimizer's step a function call.
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))


_hooks: list[Any] = []


def _weakly(function: Callable[[], T]) -> Callable[[], T | None]:
    """``function``; one that is bound to an object returns None when the object is gone."""
    if not inspect.ismethod(function):
        return function
    reference = weakref.WeakMethod(function)

    def call() -> T | None:
        method = reference()
        return None if method is None else method()

    return call


def _stacklevel() -> int:
    """Of the caller's warning: the first frame that is neither in torch nor in signvote."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level
