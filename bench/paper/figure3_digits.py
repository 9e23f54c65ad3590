"""Figure 3's question on scikit-learn's digits and a small residual network: Signum against Adam and SGD.

python bench/paper/figure3_digits.py --out signvote-bench
"""

from __future__ import annotations

import sys

import common
import figure3
from training import Digits

PLAN = figure3.Plan(
    task="digits",
    steps=120,
    tuning_steps=120,
    seeds=(0, 1, 2, 3, 4),
    learning_rates={
        "signum": (1e-3, 2e-3, 4e-3, 8e-3),
        "adam": (4e-3, 8e-3, 16e-3, 32e-3),
        "sgd": (0.025, 0.05, 0.1, 0.2),
    },
)


def run(quick: bool) -> common.Result:
    task = Digits()
    trained = len(task.images) - Digits.TUNING - Digits.TEST
    introduction = (
        f"A residual network of three blocks on scikit-learn's digits (8 x 8, 10 classes): {trained} images to train "
        f"on, {Digits.TUNING} to tune by, {Digits.TEST} to test on, {Digits.IMAGES} for each worker in each step."
    )
    plan = PLAN.quick() if quick else PLAN
    return figure3.result("figure3_digits", "Figure 3's question, a residual network", introduction, plan)


if __name__ == "__main__":
    sys.exit(common.main(run, __doc__))
