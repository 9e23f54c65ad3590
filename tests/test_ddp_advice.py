"""The advice of a state: what it warns of, when it says nothing, and that it leaves no trace."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ddp_jobs import mlp
from ranks import RankPool
from signvote.ddp import advice as advice_module
from signvote.ddp import attach
from signvote.ddp.advice import Advice, AdviceWarning
from signvote.optim import SignSGD, Signum


class Votes:
    """A model whose gradients are votes, and the part of a state that an Advice asks."""

    def __init__(
        self, scale: float | None = 1.0, dtype: torch.dtype = torch.float32, numels: Iterable[int] = (9, 3)
    ) -> None:
        self.model = nn.ParameterList([nn.Parameter(torch.ones(numel, dtype=dtype)) for numel in numels])
        self.magnitude = scale

    def parameters(self) -> Iterable[Tensor]:
        return self.model.parameters()

    def scale(self) -> float | None:
        return self.magnitude

    def advice(self, *, has_momentum: bool = False, scaled: bool = True) -> Advice:
        return Advice(self.parameters, has_momentum=has_momentum, scale=self.scale if scaled else None)

    def vote(self, factor: float = 1.0) -> None:
        for p in self.model:
            p.grad = torch.full_like(p, factor * (self.magnitude or 7.0))
            p.grad[::2] *= -1


def given(function: Callable[[], object]) -> list[str]:
    """The advice that ``function`` causes, all of it pointing at this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AdviceWarning)
        function()
    for warning in caught:
        assert warning.category is AdviceWarning
        assert Path(warning.filename) == Path(__file__)
    return [str(warning.message) for warning in caught]


def steps(votes: Votes, optimizer: Optimizer, count: int = 3, factor: float = 1.0) -> None:
    for _ in range(count):
        votes.vote(factor)
        optimizer.step()


def scaled_steps(
    votes: Votes, optimizer: Optimizer, scaler: torch.amp.GradScaler, count: int = 3, max_norm: float | None = None
) -> None:
    for _ in range(count):
        scaler.scale(torch.zeros(()))
        votes.vote()
        if max_norm is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(votes.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()


# -- What it warns of -------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "Adam": lambda p: torch.optim.Adam(p),
    "fused Adam": lambda p: torch.optim.Adam(p, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
}


@pytest.mark.parametrize("init_scale", [65536.0, 1000.0, 0.25])
@pytest.mark.parametrize("scale", [1.0, 0.003])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_grad_scaler(kind: str, scale: float, init_scale: float) -> None:
    votes = Votes(scale)
    advice = votes.advice()
    optimizer = OPTIMIZERS[kind](votes.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    (text,) = given(lambda: scaled_steps(votes, optimizer, scaler))
    assert text.startswith(
        f"signvote: GradScaler divides the vote of ±{scale:g}, which knows no loss scale, by {init_scale:g}"
    )
    assert f"gradients of {type(optimizer).__name__} are ±{scale / init_scale:.3g}" in text
    assert "SignSGD" in text
    assert 'scale="mean_abs"' in text
    advice.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_clipping(kind: str, dtype: torch.dtype) -> None:
    votes = Votes(0.3, dtype)
    advice = votes.advice()
    optimizer = OPTIMIZERS[kind](votes.parameters())

    def clipped() -> None:
        for _ in range(3):
            votes.vote()
            torch.nn.utils.clip_grad_norm_(votes.parameters(), 0.1)
            optimizer.step()

    (text,) = given(clipped)
    assert text.startswith(f"signvote: gradients of {type(optimizer).__name__} are ±0.0289, but the vote had left ±0.3")
    assert "the norm of d votes is √d" in text
    assert "SignSGD" in text
    advice.close()


@pytest.mark.parametrize("optimizer_class", [SignSGD, lambda p: Signum(p, momentum=0.0)])
def test_clipping_under_an_optimizer_that_takes_the_sign(optimizer_class: Callable[..., Optimizer]) -> None:
    votes = Votes()
    advice = votes.advice(has_momentum=True)
    optimizer = optimizer_class(votes.parameters())
    (text,) = given(lambda: steps(votes, optimizer, factor=0.25))
    assert "are ±0.25, but the vote had left ±1" in text
    assert "it has no effect" in text
    assert "its step is the same" in text
    advice.close()


def test_clipping_and_a_grad_scaler() -> None:
    votes = Votes()
    advice = votes.advice()
    optimizer = SignSGD(votes.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    (text,) = given(lambda: scaled_steps(votes, optimizer, scaler, max_norm=1e-6))
    assert "it has no effect" in text
    advice.close()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "SGD has momentum=0.9"),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), "SGD has momentum=0.9"),
        (lambda p: torch.optim.AdamW(p), r"AdamW has betas=(0.9, 0.999)"),
        (lambda p: torch.optim.RMSprop(p, momentum=0.5), "RMSprop has momentum=0.5"),
        (lambda p: Signum(p), "Signum has momentum=0.9"),
    ],
)
def test_momentum_on_momentum(make: Callable[[Iterable[Tensor]], Optimizer], options: str) -> None:
    votes = Votes()
    optimizer = make(votes.parameters())
    for scaled in (True, False):
        advice = votes.advice(has_momentum=True, scaled=scaled)
        (text,) = given(lambda: steps(votes, optimizer))
        assert text.startswith(f"signvote: {options}, on top of the hook's momentum")
        assert "momentum=0.0 in the hook" in text
        advice.close()

        advice = votes.advice(has_momentum=False, scaled=scaled)
        assert given(lambda: steps(votes, optimizer)) == []
        advice.close()


def test_momentum_of_a_group_without_votes_is_no_matter() -> None:
    votes, other = Votes(), nn.Parameter(torch.ones(1))
    advice = votes.advice(has_momentum=True)
    groups: list[dict[str, Any]] = [{"params": [*votes.parameters()]}, {"params": [other], "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups, 0.1)
    other.grad = torch.full((1,), 100.0)
    assert given(lambda: steps(votes, optimizer)) == []
    advice.close()


@pytest.mark.parametrize("has_momentum", [False, True])
def test_two_workers(has_momentum: bool) -> None:
    advice = Votes().advice(has_momentum=has_momentum)

    def check() -> None:
        for size, ties in ((1, "coin"), (2, "zero"), (2, "positive"), (3, "coin"), (4, "coin")):
            advice.check_world(size, ties)
        with pytest.warns(AdviceWarning, match="two workers tie wherever they disagree") as caught:
            advice.check_world(2, "coin")
        text = str(caught[0].message)
        assert 'ties="zero"' in text
        assert ("a momentum" in text) == (not has_momentum)
        advice.check_world(2, "coin")  # only once

    assert given(check) == []
    advice.close()


def test_all_at_once_and_each_only_once() -> None:
    votes = Votes()
    advice = votes.advice(has_momentum=True)
    optimizer = torch.optim.SGD(votes.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def train() -> None:
        scaled_steps(votes, optimizer, scaler, count=1)
        steps(votes, optimizer, factor=0.3)
        scaled_steps(votes, torch.optim.SGD(votes.parameters(), 0.1, momentum=0.8), scaler, count=1)
        steps(votes, optimizer, factor=0.2)

    momentum, loss_scale, clipping = given(train)
    assert "on top of the hook's momentum" in momentum
    assert "GradScaler" in loss_scale
    assert "clipping" in clipping
    advice.close()


@pytest.mark.parametrize("action", ["ignore", "error"])
def test_filters_rule(action: Literal["ignore", "error"], caplog: pytest.LogCaptureFixture) -> None:
    """But for an error: raised on one rank, it would leave the others waiting."""
    votes = Votes()
    advice = votes.advice()
    with warnings.catch_warnings():
        warnings.filterwarnings(action, category=AdviceWarning)
        steps(votes, torch.optim.SGD(votes.parameters(), 0.1), factor=0.5)
    advice.close()
    assert ("clipping" in caplog.text) == (action == "error")


# -- When it says nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaler", [None, 65536.0, 1.0, 1000.0])
@pytest.mark.parametrize("scale", [1.0, 0.003, 50.0])
def test_nothing_is_said_of_signsgd(scale: float, scaler: float | None) -> None:
    votes = Votes(scale)
    advice = votes.advice(has_momentum=True)
    optimizer = SignSGD(votes.parameters())
    if scaler is None:
        assert given(lambda: steps(votes, optimizer, count=20)) == []
    else:
        grad_scaler = torch.amp.GradScaler("cpu", init_scale=scaler)
        assert given(lambda: scaled_steps(votes, optimizer, grad_scaler, count=20)) == []
    advice.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_nothing_is_said_of_unscaled_votes(kind: str, dtype: torch.dtype) -> None:
    votes = Votes(0.3, dtype)
    advice = votes.advice()
    optimizer = OPTIMIZERS[kind](votes.parameters())
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert given(lambda: steps(votes, optimizer)) == []
    assert given(lambda: scaled_steps(votes, optimizer, disabled)) == []
    advice.close()


def test_a_scale_that_follows_the_loss_scale_is_right() -> None:
    votes = Votes()
    advice = votes.advice()
    optimizer = torch.optim.SGD(votes.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def train() -> None:
        for _ in range(3):
            scaler.scale(torch.zeros(()))
            votes.vote(1024.0)
            scaler.step(optimizer)
            scaler.update()

    assert given(train) == []
    advice.close()


def test_zeros_missing_and_non_finite_gradients_tell_nothing() -> None:
    votes = Votes(numels=(0, 2, 3, 5, 9))
    advice = votes.advice()
    optimizer = torch.optim.SGD(votes.parameters(), 0.1)

    def train() -> None:
        optimizer.step()
        votes.vote()
        votes.model[1].grad = None
        votes.model[2].grad = torch.zeros(3)
        votes.model[3].grad = torch.full((5,), torch.nan)
        votes.model[4].grad = torch.full((9,), torch.inf)
        optimizer.step()

    assert given(train) == []
    votes.model[4].grad = torch.tensor([0.0] * 8 + [0.5])
    assert len(given(optimizer.step)) == 1  # none of that hides the gradient that tells
    advice.close()


def test_other_optimizers_and_gradients_are_no_matter() -> None:
    votes, other = Votes(), nn.Parameter(torch.ones(2))
    advice = votes.advice(has_momentum=True)
    optimizer = torch.optim.SGD([other], 0.1, momentum=0.9)
    other.grad = torch.full((2,), 0.5)
    assert given(optimizer.step) == []
    advice.close()


def test_nothing_is_read_while_there_is_no_vote() -> None:
    votes = Votes(None)
    advice = votes.advice()
    optimizer = torch.optim.SGD(votes.parameters(), 0.1)
    assert given(lambda: steps(votes, optimizer, count=50)) == []  # dense steps
    votes.magnitude = 1.0
    assert len(given(lambda: steps(votes, optimizer, factor=0.5))) == 1
    advice.close()


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_closure(nesterov: bool) -> None:
    """The gradients to be seen are those of the step before, and Nesterov's momentum may have overwritten them."""
    votes = Votes()
    advice = votes.advice()
    optimizer = torch.optim.SGD(votes.parameters(), 0.1, momentum=0.9, nesterov=nesterov, foreach=True)

    def closure(factor: float) -> float:
        optimizer.zero_grad()
        votes.vote(factor)
        return 0.0

    def train(factor: float) -> None:
        for _ in range(3):
            optimizer.step(lambda: closure(factor))

    assert given(lambda: train(1.0)) == []
    assert len(given(lambda: train(0.5))) == (0 if nesterov else 1)
    optimizer.zero_grad()
    votes.vote(0.25)
    assert len(given(lambda: optimizer.step(None))) == (1 if nesterov else 0)  # no closure, and said already
    advice.close()


def test_it_looks_at_some_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(advice_module, "_ratio", lambda *_: looks.append(1))
    votes = Votes()
    advice = votes.advice()
    optimizer = SignSGD(votes.parameters())
    steps(votes, optimizer, count=50)
    assert len(looks) == advice_module._STEPS
    assert advice not in advice_module._watching


def test_it_never_raises() -> None:
    class Odd(torch.optim.SGD):
        """With groups that are not what they are in other optimizers."""

    votes = Votes()
    for broken in ({"momentum": "much"}, {"betas": ()}, {"momentum": torch.ones(2)}):
        advice = votes.advice(has_momentum=True)
        optimizer = Odd(votes.parameters(), 0.1)
        group = optimizer.param_groups[0]
        before = dict(group)
        group.update(broken)
        hook = optimizer.register_step_pre_hook(lambda *_: group.update(before))  # noqa: B023
        assert given(lambda: steps(votes, optimizer, count=1)) == []  # noqa: B023
        hook.remove()
        assert advice not in advice_module._watching

    def fail() -> Iterable[Tensor]:
        raise RuntimeError("gone")

    advice = Advice(fail, has_momentum=True, scale=None)
    assert given(lambda: steps(votes, optimizer)) == []
    assert advice not in advice_module._watching


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:copyreg")
def test_a_compiled_step_is_not_looked_at() -> None:
    votes = Votes()
    advice = votes.advice(has_momentum=True)
    optimizer = torch.optim.SGD(votes.parameters(), 0.1, momentum=0.9)
    compiled: Callable[[], Any] = torch.compile(optimizer.step, backend="eager")

    def train() -> None:
        votes.vote(0.5)
        compiled()

    before = [p.detach().clone() for p in votes.parameters()]
    assert given(train) == []
    assert not any(torch.equal(b, p) for b, p in zip(before, votes.parameters(), strict=True))
    assert len(given(lambda: steps(votes, optimizer, factor=0.5))) == 2
    advice.close()


# -- What it keeps ----------------------------------------------------------------------------------------------------


def test_it_keeps_nothing_alive() -> None:
    votes = Votes()
    advice = votes.advice(has_momentum=True)
    optimizer = SignSGD(votes.parameters())
    steps(votes, optimizer, count=2)
    gone = [weakref.ref(kept) for kept in (votes, votes.model, votes.model[0], optimizer)]
    del votes, optimizer
    gc.collect()
    assert [kept() for kept in gone] == [None] * 4
    others = Votes()
    assert given(lambda: steps(others, SignSGD(others.parameters()), factor=0.5)) == []  # it watches nothing any more

    reference = weakref.ref(advice)
    del advice
    assert reference() is None
    assert not advice_module._watching


def test_a_state_that_owns_its_advice_goes_with_it() -> None:
    votes = Votes()
    votes.owned = votes.advice()  # type: ignore[attr-defined]
    steps(votes, SignSGD(votes.parameters()), count=1)
    reference = weakref.ref(votes)
    gc.disable()
    try:
        del votes
        assert reference() is None  # at once: there is no cycle
    finally:
        gc.enable()


# -- Under the hook ---------------------------------------------------------------------------------------------------


def under_the_hook(
    clips: bool, loss_scale: float | None, momentum: float = 0.0, knows_scaler: bool = False
) -> list[str]:
    ddp = DistributedDataParallel(mlp())
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale or 1.0, enabled=loss_scale is not None)
    attach(ddp, momentum=momentum, scale=scaler if knows_scaler else 1.0)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1, momentum=momentum)

    def train() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(ddp(torch.randn(4, 7)).square().sum()).backward()
            if clips:
                torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()

    return given(train)


@pytest.mark.parametrize(
    ("arguments", "world", "expected"),
    [
        ((False, None), 3, None),
        ((False, None), 2, "two workers tie"),
        ((True, None), 3, "If that is clipping"),
        ((False, 1024.0), 3, "GradScaler divides the vote"),
        ((False, 1024.0, 0.0, True), 3, None),
        ((False, None, 0.9), 3, "on top of the hook's momentum"),
    ],
)
def test_votes_of_real_ranks(ranks: RankPool, arguments: tuple[Any, ...], world: int, expected: str | None) -> None:
    """One rank says it."""
    first, *others = ranks.run(under_the_hook, *arguments, world=world)
    assert others == [[]] * (world - 1)
    assert first == [] if expected is None else len(first) == 1 and expected in first[0]
