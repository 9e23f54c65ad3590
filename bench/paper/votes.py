"""Lemma D.1 and Theorem 2(b): how often a vote is wrong, against signal to noise and the number of workers.

First for noise that is known, then for the gradient of the demo's language model. Votes are packed and counted by
signvote's own kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import common
import known_noise
import real_gradient
from known_noise import SEED, TRIALS, WORKERS, Rate
from real_gradient import BLOCKS, PIECES, TRAINED, Network

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(quick: bool) -> common.Result:
    trials = 2**12 if quick else TRIALS
    known, skewed = known_noise.known_noise(trials), known_noise.skewed_noise(trials)
    blocks, trained, pieces = (1, 2, 128) if quick else (BLOCKS, TRAINED, PIECES)
    real = real_gradient.network(blocks, trained, pieces)
    sections = [
        known_noise.known_text(known, trials),
        known_noise.skewed_text(skewed),
        real_gradient.text(real, pieces),
    ]
    return common.Result(
        name="votes",
        title="Lemma D.1 and Theorem 2(b): how often a vote is wrong",
        markdown="\n\n".join(sections),
        figure=_plot(known, skewed, real),
        data={
            "seed": SEED,
            "trials": trials,
            "workers": WORKERS,
            "known": [vars(one) for one in (*known, *skewed)],
            "network": real_gradient.data_of(real),
        },
    )


def _plot(known: Sequence[Rate], skewed: Sequence[Rate], real: Network) -> Figure:
    figure = common.new_figure(13, 8)
    above, (skewed_axes, mass_axes, noise_axes) = figure.subplots(2, 3)
    known_noise.draw_known(above, known)
    known_noise.draw_skewed(skewed_axes, skewed)
    real_gradient.draw(mass_axes, noise_axes, real)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


if __name__ == "__main__":
    sys.exit(common.main(run, __doc__))
