"""signSGD and Signum as :class:`torch.optim.Optimizer`.

The algorithms are those of Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems" (ICML 2018),
with the decoupled weight decay of Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault
Tolerant" (ICLR 2019).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from numbers import Real
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from signvote.optim.noise import noise_streams, normal_noise
from signvote.optim.warmup import signum_warmup_steps

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT, StateDict

__all__ = ["SignSGD", "Signum", "signum_warmup_steps"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _SignOptimizer(Optimizer):
    """What SignSGD and Signum share: everything but the momentum."""

    def __init__(self, params: ParamsT, **options: Any) -> None:
        super().__init__(params, {**options, "noise_steps": 0})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a checkpoint from before there was noise
            group.update({"noise": 0.0, "seed": 0, "noise_steps": 0} | group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    def _check_group(self, index: int) -> None:
        name, group = type(self).__name__, self.param_groups[index]
        for option, upper in (("lr", math.inf), ("momentum", 1.0), ("weight_decay", math.inf), ("noise", math.inf)):
            if option not in group:
                continue
            value = group[option]
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name}: {option} is a {type(value).__name__}, expected a float")
            if not 0 <= float(value) < upper:
                raise ValueError(f"{name}: {option} is {value}, expected 0 <= {option} < {upper:g}")
        seed = group["seed"]
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"{name}: seed is a {type(seed).__name__}, expected an int")
        if not 0 <= seed < 2**64:
            raise ValueError(f"{name}: seed is {seed}, expected 0 <= seed < 2**64")
        for i, p in enumerate(group["params"]):
            if p.dtype not in _DTYPES:
                raise TypeError(
                    f"{name}: parameter {i} of group {index} has dtype {p.dtype}, "
                    "expected float16, bfloat16, float32 or float64"
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform a single optimization step.

        Args:
            closure (Callable, optional): A closure that reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for p in chain.from_iterable(group["params"] for group in self.param_groups):
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support gradients of layout {p.grad.layout}: a missing coordinate "
                    "has no sign. Use dense gradients, for example torch.nn.Embedding(..., sparse=False)"
                )
        with torch.no_grad():
            first = 0
            for group in self.param_groups:
                self._step_group(group, first)
                first += len(group["params"])
        return loss

    def _step_group(self, group: dict[str, Any], first: int) -> None:
        """Step with ``group``, whose parameters are the optimizer's from number ``first`` on."""
        streams = None
        if group["noise"] != 0:
            numbers = noise_streams(group["seed"], group["noise_steps"], first, len(group["params"]))
            streams = dict(zip(group["params"], numbers, strict=True))
            group["noise_steps"] += 1
        params = [p for p in group["params"] if p.grad is not None]
        foreach = group["foreach"]
        if foreach is None:
            foreach = all(p.is_cuda and type(p) in (Tensor, torch.nn.Parameter) for p in params)
        if foreach:
            # The foreach kernels are fast only over one device and dtype.
            batches: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for p in params:
                batches[p.device, p.dtype].append(p)
            for batch in batches.values():
                _multi_tensor_step(batch, self._momenta(batch), streams, group)
        else:
            _single_tensor_step(params, self._momenta(params), streams, group)

    def _momenta(self, params: list[Tensor]) -> list[Tensor] | None:
        return None


class SignSGD(_SignOptimizer):
    r"""Implements signSGD.

    .. math::
        x \leftarrow x - \eta \, (\mathrm{sign}(g) + \lambda x)

    with the gradient :math:`g`, the learning rate :math:`\eta` and the weight decay :math:`\lambda`. For
    :math:`\lambda = 0` this is Algorithm 1 of `signSGD: Compressed Optimisation for Non-Convex Problems`_. The weight
    decay is decoupled as in Algorithm 1 of `signSGD with Majority Vote is Communication Efficient and Fault
    Tolerant`_: it never passes through the sign.

    This is the optimizer to use under :func:`~signvote.ddp.majority_vote_hook`, which leaves the voted sign in every
    gradient. Because the step takes the sign again, nothing that scales the gradient between ``backward()`` and
    ``step()`` can change it: under another optimizer, ``GradScaler.unscale_`` turns the vote of ±1 into ±1.5e-5 (at
    the initial loss scale of 65536), and ``clip_grad_norm_`` to norm 1 turns it into :math:`\pm 1/\sqrt{d}` for
    :math:`d` coordinates.

    Args:
        params (iterable): iterable of parameters or named_parameters to optimize, or iterable of dicts defining
            parameter groups. float16, bfloat16, float32 or float64
        lr (float, optional): learning rate: how far every coordinate moves in one step. 30 to 180 times below that of
            SGD, or that of Adam. A tensor is refused (default: 1e-4)
        weight_decay (float, optional): decoupled weight decay (default: 0)
        maximize (bool, optional): maximize the objective instead of minimizing it (default: False)
        foreach (bool, optional): whether to use the foreach implementation, which gives the same bits. The default
            uses it where all parameters are on CUDA. It holds the signs of all parameters at a time, the other one
            those of a single parameter (default: None)
        noise (float, optional): standard deviation :math:`\nu` of Gaussian noise on the update, next to steps of ±1
            (default: 0)
        seed (int, optional): of the noise, 0 <= seed < 2**64, the same on all workers (default: 0)

    .. note::
        A coordinate whose gradient is exactly 0 takes no step: sign(0) is 0.

    .. note::
        With ``noise`` the step is :math:`x \leftarrow x - \eta \, (\mathrm{sign}(g) + \nu n + \lambda x)`, where
        :math:`n` is drawn from the normal distribution for every coordinate of the parameters that have a gradient
        in this step, also where that is 0. The paper proposes it in section 6, as it might help Signum to generalise.
        It is a function of the seed, the number of noisy steps, the parameter's place in the optimizer and the
        coordinate's in the parameter, so that all workers draw the same and nothing is sent. Neither the kind of CPU
        nor a GPU makes a difference (no GPU has run it yet). The values are the 65,536 quantiles at
        :math:`(k + 1/2) / 65536`: none is beyond 4.33, and the variance is 1 to within 0.003 %. ``noise`` may differ
        between groups, and may change: a schedule sets ``group["noise"]``. A checkpoint holds all of it in the groups,
        and continues bit for bit.

    .. note::
        NaN or infinity in a gradient makes the parameter NaN, as it would in other optimizers. ``torch.sign`` alone
        would hide it (``torch.sign(nan)`` is 0).

    .. note::
        A step smaller than half the spacing of the parameter's dtype is lost. In bfloat16 a coordinate of size
        :math:`|x|` does not move at all with ``lr`` below :math:`|x|/512`: keep float32 parameters and use
        :class:`torch.autocast`.

    Example:
        >>> optimizer = signvote.optim.SignSGD(model.parameters(), lr=1e-4, weight_decay=0.1)
        >>> optimizer.zero_grad()
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()

    .. _signSGD\: Compressed Optimisation for Non-Convex Problems:
        https://arxiv.org/abs/1802.04434
    .. _signSGD with Majority Vote is Communication Efficient and Fault Tolerant:
        https://arxiv.org/abs/1810.05291
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params, lr=lr, weight_decay=weight_decay, maximize=maximize, foreach=foreach, noise=noise, seed=seed
        )


class Signum(_SignOptimizer):
    r"""Implements Signum: signSGD with momentum.

    .. math::
        v & \leftarrow \beta v + (1 - \beta) g \\
        x & \leftarrow x - \eta \, (\mathrm{sign}(v) + \lambda x)

    with the gradient :math:`g`, the momentum :math:`v`, 0 at first, its constant :math:`\beta`, the learning rate
    :math:`\eta` and the weight decay :math:`\lambda`. For :math:`\lambda = 0` this is Algorithm 2 of `signSGD\:
    Compressed Optimisation for Non-Convex Problems`_; with it, it is Algorithm 1 of `signSGD with Majority Vote is
    Communication Efficient and Fault Tolerant`_ for one worker.

    This is for training without a vote. Under :func:`~signvote.ddp.majority_vote_hook` the momentum is the hook's, one
    for each worker, and the optimizer is :class:`SignSGD`.

    Args:
        params (iterable): iterable of parameters or named_parameters to optimize, or iterable of dicts defining
            parameter groups. float16, bfloat16, float32 or float64
        lr (float, optional): learning rate: how far every coordinate moves in one step. 30 to 180 times below that of
            SGD, or that of Adam. A tensor is refused (default: 1e-4)
        momentum (float, optional): momentum constant :math:`\beta`, 0 <= β < 1 (default: 0.9)
        weight_decay (float, optional): decoupled weight decay (default: 0)
        maximize (bool, optional): maximize the objective instead of minimizing it (default: False)
        foreach (bool, optional): whether to use the foreach implementation, which gives the same bits. The default
            uses it where all parameters are on CUDA. It holds the signs of all parameters at a time, the other one
            those of a single parameter (default: None)
        noise (float, optional): standard deviation :math:`\nu` of Gaussian noise on the update, next to steps of ±1
            (default: 0)
        seed (int, optional): of the noise, 0 <= seed < 2**64, the same on all workers (default: 0)

    .. note::
        ``noise`` is that of :class:`SignSGD`: :math:`x \leftarrow x - \eta \, (\mathrm{sign}(v) + \nu n + \lambda x)`.

    .. note::
        The momentum is float32 for float16 and bfloat16 parameters, also after ``load_state_dict``: in bfloat16
        :math:`(1 - \beta) g` would be lost in it.

    .. note::
        A momentum no larger than the smallest normal number counts as 0. By rounding, :math:`\beta v` never gets below
        the smallest subnormal number: a coordinate that gets no gradient any more would move one way for ever.

    .. note::
        NaN or infinity in a gradient makes parameter and momentum NaN; :class:`torch.amp.GradScaler` skips such a
        step. On steps lost in bfloat16 parameters see :class:`SignSGD`.

    Example:
        >>> optimizer = signvote.optim.Signum(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=0.1)
        >>> optimizer.zero_grad()
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()

    .. _signSGD\: Compressed Optimisation for Non-Convex Problems:
        https://arxiv.org/abs/1802.04434
    .. _signSGD with Majority Vote is Communication Efficient and Fault Tolerant:
        https://arxiv.org/abs/1810.05291
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            noise=noise,
            seed=seed,
        )

    def _momenta(self, params: list[Tensor]) -> list[Tensor]:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=_momentum_dtype(p))
        return [self.state[p]["momentum_buffer"] for p in params]

    def load_state_dict(self, state_dict: StateDict) -> None:
        # Optimizer.load_state_dict casts the state to the parameter's dtype, so the momentum of a float16 or bfloat16
        # parameter is taken from the dictionary again: from the one that the pre-hooks hand on.
        loaded: list[StateDict] = []
        last_pre_hook = self.register_load_state_dict_pre_hook(lambda _, handed_on: loaded.append(handed_on))
        try:
            super().load_state_dict(state_dict)
        finally:
            last_pre_hook.remove()
        saved_ids = chain.from_iterable(group["params"] for group in loaded[0]["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, p in zip(saved_ids, params, strict=True):
            if saved_id in loaded[0]["state"]:
                momentum = loaded[0]["state"][saved_id]["momentum_buffer"]
                self.state[p]["momentum_buffer"] = momentum.to(device=p.device, dtype=_momentum_dtype(p))


def _momentum_dtype(p: Tensor) -> torch.dtype:
    """The dtype of the momentum and of the arithmetic, which rounds to the dtype of p only what is stored in p."""
    return torch.float64 if p.dtype is torch.float64 else torch.float32


def _grads(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _underflow(momentum: Tensor) -> float:
    """The factor that makes 0 of every number up to the smallest normal one, and of no larger one."""
    return torch.finfo(momentum.dtype).eps / 2


# In both implementations, adding v with alpha=0 leaves the sign of a finite number alone and makes NaN of the others.
# Noise is added in steps that each round once, in every kernel of torch: x + a·y may be rounded once or twice, except
# where a is 1 or -1 or y is.


def _single_tensor_step(
    params: list[Tensor], momenta: list[Tensor] | None, streams: dict[Tensor, int] | None, group: dict[str, Any]
) -> None:
    lr, weight_decay, maximize = group["lr"], group["weight_decay"], group["maximize"]
    for i, (p, grad) in enumerate(zip(params, _grads(params), strict=True)):
        if momenta is None:
            v = grad.to(_momentum_dtype(p))
            signs = v.sign().add_(v, alpha=0)
        else:
            v = momenta[i].mul_(group["momentum"]).add_(grad, alpha=1 - group["momentum"])
            signs = v.mul(_underflow(v)).sign_().add_(v, alpha=0)
        if weight_decay != 0:
            p.mul_(1 - lr * weight_decay)
        if streams is None:
            p.add_(signs, alpha=lr if maximize else -lr)
        else:
            update = normal_noise(p, _momentum_dtype(p), streams[p]).mul_(group["noise"])
            p.sub_(update.add_(signs, alpha=-1 if maximize else 1).mul_(lr))


def _multi_tensor_step(
    params: list[Tensor], momenta: list[Tensor] | None, streams: dict[Tensor, int] | None, group: dict[str, Any]
) -> None:
    lr, weight_decay, maximize, grads = group["lr"], group["weight_decay"], group["maximize"], _grads(params)
    if momenta is None:
        grads = [grad.to(_momentum_dtype(p)) for p, grad in zip(params, grads, strict=True)]
        signs = torch._foreach_sign(grads)
        torch._foreach_add_(signs, grads, alpha=0)
    else:
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads, alpha=1 - group["momentum"])
        signs = torch._foreach_mul(momenta, _underflow(momenta[0]))
        torch._foreach_sign_(signs)
        torch._foreach_add_(signs, momenta, alpha=0)
    if weight_decay != 0:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    if streams is None:
        torch._foreach_add_(params, signs, alpha=lr if maximize else -lr)
    else:
        updates = [normal_noise(p, _momentum_dtype(p), streams[p]) for p in params]
        torch._foreach_mul_(updates, group["noise"])
        torch._foreach_add_(updates, signs, alpha=-1 if maximize else 1)
        torch._foreach_mul_(updates, lr)
        torch._foreach_sub_(params, updates)
