"""Figure 3's question on the language model of `signvote demo`, at half its width: Signum against Adam and SGD.

python bench/paper/figure3_language.py --out signvote-bench
"""

from __future__ import annotations

import sys

import common
import figure3
from training import Language

PLAN = figure3.Plan(
    task="language",
    steps=180,
    tuning_steps=90,
    seeds=common.SEEDS,
    learning_rates={
        "signum": (1e-3, 2e-3, 4e-3, 8e-3),
        "adam": (2e-3, 4e-3, 8e-3, 16e-3),
        "sgd": (0.0125, 0.025, 0.05, 0.1),
    },
)


def run(quick: bool) -> common.Result:
    introduction = (
        "The transformer of `signvote demo` at half its width, on the Python standard library's source: "
        f"{Language.SEQUENCES} sequences of {Language.CONTEXT} bytes for each worker in each step; loss in nats per "
        "byte, errors in bytes that are not the most likely one."
    )
    plan = PLAN.quick() if quick else PLAN
    return figure3.result("figure3_language", "Figure 3's question, a language model", introduction, plan)


if __name__ == "__main__":
    sys.exit(common.main(run, __doc__))
