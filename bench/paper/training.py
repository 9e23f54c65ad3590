"""Trainings for the experiments: two tasks, three optimizers, one worker or several that are simulated in this process.

Every worker computes the gradient of a batch of its own. Signum between workers is the vote of `simulation.py`; Adam
and SGD between workers take the mean of the gradients, as `DistributedDataParallel` without a hook.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from common import MissingPackageError
from signvote.cli.demo import data
from signvote.cli.demo.model import Transformer
from signvote.cli.demo.model import loss as language_loss
from signvote.optim import SignSGD, Signum
from simulation import SimulatedVote, shard_owners

MOMENTUM = 0.9  # of all optimizers
BETA2 = 0.99  # Adam's: its default, 0.999, averages over more steps than a training here has
WARMUP = 0.1  # part of the steps


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        decay: The part that weight decay takes from a weight in a step, at the top of the schedule: the same for all
            optimizers, whose own settings of it follow from it and from the learning rate.
        flipped: How many of the workers send the opposite of every sign.
        sharded: Each worker is the server of a shard, and those of the flipped ones answer with the opposite too.
        split: What the loss at the end is measured on: "tuning", to choose settings by, or "test".
    """

    task: str
    optimizer: str
    workers: int
    lr: float
    decay: float
    steps: int
    seed: int
    split: str = "test"
    flipped: int = 0
    sharded: bool = False


@dataclass(frozen=True)
class Curve:
    """What came of it: the mean of the workers' training losses in each step, and the loss and errors at the end."""

    losses: list[float]
    loss: float
    errors: float


def train(training: Training) -> Curve:
    torch.manual_seed(training.seed)
    task = TASKS[training.task]()
    model = task.new_model()
    parameters = list(model.parameters())
    numels = [parameter.numel() for parameter in parameters]
    vote = None
    if training.optimizer == "signum" and training.workers > 1:
        vote = SimulatedVote(numels, training.workers, momentum=MOMENTUM, seed=training.seed)
    optimizer = new_optimizer(training, parameters)
    scheduler = LambdaLR(optimizer, functools.partial(schedule, training.steps))
    batches = [
        torch.Generator().manual_seed(training.seed * training.workers + worker) for worker in range(training.workers)
    ]
    gradients = torch.empty(training.workers, sum(numels))
    answers = torch.ones(sum(numels))
    if training.sharded:
        owners = shard_owners(numels, training.workers)
        answers[owners < training.flipped] = -1.0
    losses = []
    for _ in range(training.steps):
        total = 0.0
        for generator, row in zip(batches, gradients, strict=True):
            optimizer.zero_grad()
            loss = task.loss(model, generator)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.cat([gradient_of(parameter).flatten() for parameter in parameters], out=row)
            total += loss.item()
        losses.append(total / training.workers)
        gradients[: training.flipped].neg_()  # with them the momentum, and the signs that are sent
        combined = gradients.mean(dim=0) if vote is None else vote.vote(gradients) * answers
        for parameter, gradient in zip(parameters, torch.split(combined, numels), strict=True):
            parameter.grad = gradient.view_as(parameter)
        optimizer.step()
        scheduler.step()
    model.eval()
    with torch.no_grad():
        return Curve(losses, *task.measure(model, training.split))


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def schedule(steps: int, step: int) -> float:
    """Learning rate at `step`, as a part of the top one: a short rise, then a straight line to zero."""
    return min((step + 1) / max(1.0, WARMUP * steps), (steps - step) / steps)


def new_optimizer(training: Training, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    lr, weight_decay = training.lr, training.decay / training.lr
    if training.optimizer == "signum" and training.workers > 1:
        return SignSGD(parameters, lr=lr, weight_decay=weight_decay)
    if training.optimizer == "signum":
        return Signum(parameters, lr=lr, momentum=MOMENTUM, weight_decay=weight_decay)
    if training.optimizer == "adam":
        return torch.optim.AdamW(parameters, lr=lr, betas=(MOMENTUM, BETA2), weight_decay=weight_decay)
    # SGD's decay goes through its momentum, which sums up 1 / (1 - momentum) of it.
    return torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM, weight_decay=(1.0 - MOMENTUM) * weight_decay)


# -- Tasks ------------------------------------------------------------------------------------------------------------


class Task(Protocol):
    def new_model(self) -> nn.Module: ...

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Of a random batch of one worker."""

    def measure(self, model: nn.Module, split: str) -> tuple[float, float]:
        """Loss and share of wrong answers on what was not trained on."""


class Language:
    """The language model and text of `signvote demo`, at half the width."""

    SEQUENCES, CONTEXT, WIDTH, PIECES = 4, 64, 64, 256

    def __init__(self) -> None:
        self.corpus = _corpus()
        pieces = data.every(self.corpus.held_out, 2 * self.PIECES, self.CONTEXT)
        self.held_out = {"tuning": pieces[0::2], "test": pieces[1::2]}

    def new_model(self) -> nn.Module:
        return Transformer(width=self.WIDTH, context=self.CONTEXT)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        return language_loss(model, data.sample(self.corpus.train, self.SEQUENCES, self.CONTEXT, generator))

    def measure(self, model: nn.Module, split: str) -> tuple[float, float]:
        losses, wrong = [], []
        for part in torch.split(self.held_out[split], 64):
            logits, target = model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()
            losses.append(functional.cross_entropy(logits, target).item())
            wrong.append((logits.argmax(dim=1) != target).double().mean().item())
        return sum(losses) / len(losses), sum(wrong) / len(wrong)


@functools.cache
def _corpus() -> data.Corpus:
    return data.load_corpus()


class Digits:
    """scikit-learn's handwritten digits, 1,797 images of 8 x 8 in 10 classes, and a residual network."""

    IMAGES, TUNING, TEST = 32, 400, 1000

    def __init__(self) -> None:
        self.images, self.classes = _digits()

    def new_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Residual(16, 16, stride=1),
            Residual(16, 32, stride=2),
            Residual(32, 64, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.images) - self.TUNING - self.TEST, (self.IMAGES,), generator=generator)
        return functional.cross_entropy(model(self.images[chosen]), self.classes[chosen])

    def measure(self, model: nn.Module, split: str) -> tuple[float, float]:
        held_out = slice(-self.TEST, None) if split == "test" else slice(-self.TEST - self.TUNING, -self.TEST)
        logits, target = model(self.images[held_out]), self.classes[held_out]
        return functional.cross_entropy(logits, target).item(), (logits.argmax(dim=1) != target).double().mean().item()


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """Images and classes in an order drawn once for all; the last ones are held out."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise MissingPackageError("needs scikit-learn: pip install '.[paper]'") from None
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(found.images).float()[:, None] / 16.0 - 0.5
    return images[order], torch.from_numpy(found.target).long()[order]


class Residual(nn.Module):
    """Two convolutions, added to the input."""

    def __init__(self, channels_in: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = functional.relu(self.body(x) + self.shortcut(x))
        return y


TASKS: dict[str, Callable[[], Task]] = {"language": Language, "digits": Digits}
