"""`bench/paper`: the simulated vote against the hook's definition, the quick forms of the experiments, and all.py; not
what they find.
"""

from __future__ import annotations

import builtins
import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import byzantine
import common
import exchanges
import figure3
import figure3_digits
import figure3_language
import table1
import training
from ddp_simulation import Simulation
from simulation import SimulatedVote, shard_owners
from training import Curve, Training

all_experiments = importlib.import_module("all")

NUMELS = (70, 1, 64, 200)
NAMES = [f"p{i}" for i in range(len(NUMELS))]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("workers", [1, 4, 7])
def test_the_simulated_vote_is_that_of_the_hook(workers: int, momentum: float) -> None:
    ours = SimulatedVote(NUMELS, workers, momentum=momentum, seed=5)
    theirs = Simulation(workers, NAMES, momentum=momentum, seed=5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradients = torch.randint(-2, 3, (workers, sum(NUMELS)), generator=generator).float()  # many zeros and ties
        expected = theirs.vote([dict(zip(NAMES, torch.split(row, list(NUMELS)), strict=True)) for row in gradients])
        assert torch.equal(ours.vote(gradients), torch.cat([expected[name] for name in NAMES]))
    assert ours.ties > 0 or workers % 2


def test_every_coordinate_has_one_server() -> None:
    owners = shard_owners((1000, 24), 4)
    assert torch.equal(owners, owners.sort().values)
    assert owners.bincount().tolist() == [320, 320, 320, 64]  # 17 blocks of 64, in shards of 5


def test_weight_decay_takes_the_same_part_with_every_optimizer() -> None:
    for optimizer, workers in (("signum", 1), ("signum", 4), ("adam", 1)):
        parameter = torch.nn.Parameter(torch.tensor([8.0]))
        found = training.new_optimizer(Training("language", optimizer, workers, 1e-9, 0.25, 1, 0), [parameter])
        parameter.grad = torch.zeros(1)
        found.step()
        assert parameter.item() == pytest.approx(6.0)
    parameter = torch.nn.Parameter(torch.tensor([8.0], dtype=torch.float64))
    found = training.new_optimizer(Training("language", "sgd", 1, 1e-3, 1e-6, 1, 0), [parameter])
    for _ in range(300):  # longer than its momentum's memory
        parameter.grad = torch.zeros_like(parameter)
        found.step()
    before = parameter.item()
    for _ in range(300):
        found.step()
    assert 1.0 - parameter.item() / before == pytest.approx(300e-6, rel=1e-2)


@pytest.mark.parametrize("workers", [1, 2, 8, 63])
def test_levels_are_unpacked_as_they_were_packed(workers: int) -> None:
    levels = np.random.default_rng(0).integers(-workers, workers, 1000, endpoint=True)
    levels[:100] = workers
    words = exchanges.pack_levels(levels, workers)
    assert len(words) == exchanges.num_level_words(len(levels), workers)
    np.testing.assert_array_equal(exchanges.unpack_levels(words, len(levels), workers), levels)


def test_table1_counts_what_the_formulas_say(tmp_path: Path) -> None:
    """Through all.py, as a process of its own."""
    assert all_experiments.main(["table1", "--quick", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "measured" / "table1.json").read_text())
    counts = {count["method"]: count["bits_per_worker_and_coordinate"] for count in document["data"]["counts"]}
    assert set(counts) == set(table1.FORMULAS)
    for method, (_, formula) in table1.FORMULAS.items():
        # What does not grow with the coordinates is less than 4 % of a vote on 10,000.
        assert formula(2) <= counts[method] < 1.04 * formula(2), method
    assert (tmp_path / "measured" / "table1.png").read_bytes().startswith(b"\x89PNG")
    assert document["markdown"] in (tmp_path / "README.md").read_text()


def test_the_entropy_of_three_equal_chances() -> None:
    assert table1.entropy(0.0) == 0.0
    assert table1.entropy(2 / 3) == pytest.approx(math.log2(3))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other processes, each of which would import torch; and little to measure the loss on."""
    monkeypatch.setattr(common, "usable_cpus", lambda: 1)
    monkeypatch.setattr(training.Language, "PIECES", 16)


@pytest.mark.usefixtures("in_this_process")
def test_figure3_trains_every_contender(tmp_path: Path) -> None:
    result = figure3_language.run(True)
    contenders = result.data["contenders"]
    assert [(one["optimizer"], one["workers"]) for one in contenders] == [
        (optimizer, workers) for workers in (1, 4) for optimizer in ("signum", "adam", "sgd")
    ]
    plan = figure3_language.PLAN.quick()
    assert len(result.data["tuning"]) == len(contenders) * len(figure3.DECAYS)
    for one in contenders:
        assert [len(losses) for losses in one["training_losses"]] == [plan.steps] * len(plan.seeds)
        assert all(losses[-1] < losses[0] for losses in one["training_losses"])
    png, document = common.write(result, tmp_path, quick=True, seconds=1.0)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert json.loads(document.read_text())["data"] == json.loads(json.dumps(result.data))


def test_learning_rates_are_tuned_by_grids_of_one_size() -> None:
    for plan in (figure3_language.PLAN, figure3_digits.PLAN):
        grids = [plan.grid(optimizer, workers) for optimizer in figure3.OPTIMIZERS for workers in figure3.WORKERS]
        assert len({len(grid) for grid in grids}) == 1
        assert {one.split for grid in grids for one in grid} == {"tuning"}
        assert figure3.TUNING_SEED not in plan.seeds


def test_digits_train_and_keep_the_test_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins of the images: each is filled with the number of its class."""
    total = 64 + training.Digits.TUNING + training.Digits.TEST
    classes = torch.arange(total) % 10
    images = (classes.float() / 10)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    images[64:] += 1.0  # so that training on what is held out would be seen
    monkeypatch.setattr(training, "_digits", lambda: (images, classes))
    task = training.Digits()
    seen: list[torch.Tensor] = []

    def watch(module: Any, inputs: tuple[torch.Tensor]) -> None:
        seen.append(inputs[0])

    model = task.new_model()
    model.register_forward_pre_hook(watch)
    task.loss(model, torch.Generator().manual_seed(0))
    assert len(seen[0]) == training.Digits.IMAGES
    assert seen[0].max() < 1.0
    model.eval()
    for split, size in (("tuning", training.Digits.TUNING), ("test", training.Digits.TEST)):
        task.measure(model, split)
        assert seen[-1].min() >= 1.0
        assert len(seen[-1]) == size
    curve = training.train(Training("digits", "signum", 4, 2e-3, 0.0, 3, 0))
    assert len(curve.losses) == 3
    assert 0.0 <= curve.errors <= 1.0


def test_without_scikit_learn_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = builtins.__import__

    def without_sklearn(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    training._digits.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    assert common.main(figure3_digits.run, None, ["--quick", "--out", str(tmp_path)]) == 1
    assert "needs scikit-learn: pip install '.[paper]'" in capsys.readouterr().err


def test_flipped_workers_lose_the_vote_until_they_are_the_majority() -> None:
    ends = {
        flipped: training.train(Training("language", "signum", 7, 4e-3, 0.0, 4, 0, flipped=flipped)).losses
        for flipped in (3, 4)
    }
    assert ends[3][-1] < ends[3][0] == ends[4][0] < ends[4][-1]


def test_servers_that_lie_reach_their_shard_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.Tensor] = []

    class Watched(SimulatedVote):
        def vote(self, gradients: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(gradients[0])

    def no_step(training: Training, parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        optimizer.register_step_pre_hook(
            lambda *_: found.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        )
        return optimizer

    monkeypatch.setattr(training, "SimulatedVote", Watched)
    monkeypatch.setattr(training, "new_optimizer", no_step)
    training.train(Training("language", "signum", 7, 1e-3, 0.0, 1, 0, flipped=2, sharded=True))
    training.train(Training("language", "signum", 7, 1e-3, 0.0, 1, 0, flipped=2))
    assert (found[0] < 0).double().mean().item() == pytest.approx(2 / 7, abs=1e-3)
    assert (found[1] > 0).all()


@pytest.mark.usefixtures("in_this_process")
def test_byzantine_trains_with_every_number_of_flipped_workers() -> None:
    result = byzantine.run(True)
    trained = {(one["flipped"], one["sharded"], one["workers"]) for one in result.data["trainings"]}
    assert trained == {
        *((flipped, False, 7) for flipped in range(5)),
        *((flipped, True, 7) for flipped in byzantine.SHARDED),
        (0, False, 1),
    }
    assert result.figure is not None
    assert "4 of 7" in result.markdown


def test_byzantine_says_where_it_breaks() -> None:
    ends = {0: [2.0, 2.1], 1: [2.2, 2.2], 2: [2.3, 2.4], 3: [2.6, 2.6], 4: [9.0, math.nan]}
    text = byzantine.verdict(6.0, ends, {1: [2.5, 2.5], 3: [7.0, 3.0]}, [2.5, 2.5])
    assert "learns with 0, 1, 2, 3 of 7 flipped, and ends above the loss it began with" in text
    assert "breaks where the flipped ones are the majority, as the theory has it" in text
    assert "3 of 7 cost 0.550 nats against none, and end 0.100 above one honest worker alone" in text
    assert "1 cost 0.300 nats more, and it ends below the loss it began with" in text
    assert "3 cost 2.400 nats more, and it ends no lower than it began" in text
    assert "not what was found" in byzantine.verdict(6.0, ends | {3: [6.1, 2.0]}, {}, [2.5, 2.5])


def test_the_best_setting_is_never_one_that_diverged() -> None:
    def one(lr: float) -> Training:
        return Training("language", "signum", 7, lr, 0.0, 1, 0)

    assert byzantine.best_rate({one(1.0): Curve([], math.nan, 1.0), one(2.0): Curve([], 3.0, 1.0)}, 0) == 2.0


def test_jobs_keep_their_order_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "usable_cpus", lambda: 2)
    assert common.each(math.sqrt, [9.0, 1.0, 4.0]) == [3.0, 1.0, 2.0]


def test_spreads() -> None:
    assert common.spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert common.spread([1.0]) == "1.000"
    assert common.spread([1.0, math.nan]) == "diverged in 1 of 2"
    assert common.extent([1.0, 2.5], 1) == "1.8 (1.0 to 2.5)"
    assert common.table(["", "a"], [["x", "1"]]) == "|  | a |\n| --- | ---: |\n| x | 1 |"


def test_all_writes_a_section_for_each_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = common.new_figure(2.0, 2.0)
    figure.subplots().plot([1, 2])
    for name, plot in (("table1", figure), ("byzantine", None)):
        result = common.Result(name, f"About {name}", "Some text.", plot, {"value": math.nan})
        common.write(result, tmp_path / "measured", quick=True, seconds=1.5)
    text = all_experiments.report(tmp_path / "measured")
    assert text.index("## About table1\n\nSome text.\n\n![About table1](measured/table1.png)") < text.index(
        "## About byzantine\n\nSome text.\n\n## Machine"
    )
    assert "| [byzantine.py](byzantine.py) | 2 | yes |" in text
    assert json.loads((tmp_path / "measured" / "byzantine.json").read_text())["data"] == {"value": None}
    for name in all_experiments.EXPERIMENTS:
        assert (all_experiments.HERE / f"{name}.py").exists()
    for arguments, problem in ((["nothing"], "expected one of table1, "), (["--quick"], "expected --out with it")):
        with pytest.raises(SystemExit):
            all_experiments.main(arguments)
        assert problem in capsys.readouterr().err
