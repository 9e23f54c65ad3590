"""How far the votes of the ranks agree with the outcome, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from signvote.ddp.layout import NUMEL, PLACE, WORD, MessageLayout
from signvote.ddp.numbers import Numbers
from signvote.ddp.stats import ParameterStats


class AgreementRates:
    """A rank's own rates of the last step, and the means over all ranks of the step before.

    A rank knows how far its own votes agree with the outcome; the mean over ranks, which comes with the next vote, is
    the agreement, and of votes for the outcome less votes against it, the margin.
    """

    def __init__(self) -> None:
        self._own: dict[int, tuple[float, float]] = {}
        self._mean: dict[int, ParameterStats] = {}

    def own(self, places: Iterable[int]) -> Numbers:
        """What to send: two numbers for each of the parameters at ``places``, NaN where there was no vote yet."""
        rates = [self._own.get(place, (np.nan, np.nan)) for place in places]
        return np.array(rates, np.float32).reshape(-1)

    def learn(self, places: Iterable[int], means: Numbers) -> None:
        """The means of what all ranks sent."""
        for place, (agreement, margin) in zip(places, means.reshape(-1, 2).tolist(), strict=True):
            if agreement == agreement:
                self._mean[place] = ParameterStats(agreement, max(0.0, margin))

    def compare(
        self, sent_layout: MessageLayout, result_layout: MessageLayout, sent: torch.Tensor, result: torch.Tensor
    ) -> None:
        """Of a vote that is over: the planes that this rank sent, and those that came back."""
        totals: dict[int, tuple[int, int, int]] = {}
        for sent_run, result_run in zip(sent_layout.runs, result_layout.runs, strict=True):
            numel = int(sent_run[NUMEL])
            ours, votes = _planes(sent_layout, sent, int(sent_run[WORD]), numel)
            outcome, decided = _planes(result_layout, result, int(result_run[WORD]), numel)
            counted = votes & decided
            equal = int(np.sum(counted & (ours == outcome)))
            lead = 2 * equal - int(np.sum(counted))
            both_zero = int(np.sum(~votes & ~decided))
            before = totals.get(int(sent_run[PLACE]), (0, 0, 0))
            totals[int(sent_run[PLACE])] = before[0] + equal + both_zero, before[1] + lead, before[2] + numel
        for place, (agreed, lead, numel) in totals.items():
            self._own[place] = agreed / numel, lead / numel

    @property
    def by_place(self) -> dict[int, ParameterStats]:
        return dict(sorted(self._mean.items()))


def _planes(layout: MessageLayout, words: torch.Tensor, word: int, numel: int) -> tuple[np.ndarray, np.ndarray]:
    """Signs, and which of them count, of a run that begins at ``word``."""

    def bits(begin: int) -> np.ndarray:
        plane = words.view(-1)[begin : begin + -(-numel // 32)].numpy()
        return np.unpackbits(plane.view(np.uint8), count=numel, bitorder="little").astype(bool)

    return bits(word), bits(word + layout.stride) if layout.num_planes == 2 else np.ones(numel, bool)
