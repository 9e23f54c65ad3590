"""The experiments of bench/paper that check the paper's theory: their computations, and that each runs."""

import itertools
import json
import math
from collections.abc import Iterator
from statistics import NormalDist
from types import ModuleType

import numpy as np
import pytest
import torch

import common
import figure_a1
import figures_1_2
import known_noise
import real_gradient
import theorems
import votes
from signvote.cli.demo.model import Transformer
from signvote.cli.json_values import finite
from signvote.diagnostics import density
from signvote.optim import signum_warmup_steps


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread and one process."""
    monkeypatch.setattr(common, "each", lambda function, jobs: [function(job) for job in jobs])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("experiment", [figure_a1, figures_1_2, theorems, votes], ids=lambda module: module.__name__)
def test_each_experiment_runs(experiment: ModuleType) -> None:
    result = experiment.run(True)
    assert result.name == experiment.__name__
    assert result.figure is not None
    json.dumps(finite(result.data), allow_nan=False)
    assert "nan" not in result.markdown
    tables = [list(rows) for some, rows in itertools.groupby(result.markdown.splitlines(), _is_row) if some]
    assert tables
    for rows in tables:
        assert len({row.count("|") for row in rows}) == 1, rows


def _is_row(line: str) -> bool:
    return line.startswith("|")


# -- Figure A.1 -------------------------------------------------------------------------------------------------------


def test_quadratic_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure_a1, "NOISE", 0.0)
    sgd = figure_a1.objectives("SGD", [0.1, 0.5], steps=5, repeats=3, seed=0)
    assert sgd.shape == (6, 2, 3)
    decay = np.array([0.9, 0.5])[:, None] ** (2 * np.arange(6)[:, None, None])
    np.testing.assert_allclose(sgd, sgd[0] * decay)
    x = np.random.default_rng(0).standard_normal((3, 100))
    sign = figure_a1.objectives("signSGD", [0.01], steps=2, repeats=3, seed=0)
    for k in range(3):
        np.testing.assert_allclose(sign[k, 0], 0.5 * np.square(x).sum(axis=1))
        x -= 0.01 * np.sign(x)


def test_noise_is_on_the_first_coordinate_alone() -> None:
    one_step = figure_a1.objectives("SGD", [1.0], steps=1, repeats=4000, seed=0)[1, 0]
    # At rate 1 a step leaves nothing but the noise: half of its square has the mean NOISE^2 / 2.
    assert one_step.mean() == pytest.approx(figure_a1.NOISE**2 / 2, rel=0.1)


def test_rates_are_chosen_by_other_repeats_than_they_are_measured_on() -> None:
    (tuned,) = figure_a1.tune("SGD", [50], repeats=4)
    assert tuned.rate in figure_a1.RATES
    assert tuned.best_decade in figure_a1.DECADES
    curve = figure_a1.objectives("SGD", [tuned.rate], 50, 4, figure_a1.SEED)
    np.testing.assert_allclose(tuned.final, curve[50, 0])


# -- Theorems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", theorems.PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("calls", [1, 7])
def test_noise_of_a_batch(problem: theorems.Problem, calls: int) -> None:
    noise = problem.noise(np.random.default_rng(0), (20_000, theorems.DIMENSIONS), calls)
    deviation = problem.deviation / math.sqrt(calls)
    np.testing.assert_allclose(noise.mean(axis=0) / deviation, 0.0, atol=0.04)
    np.testing.assert_allclose(noise.std(axis=0) / deviation, 1.0, atol=0.05)


def test_votes_are_signs_of_sums_of_signs() -> None:
    gradients = np.random.default_rng(0).standard_normal((5, 4, 100))
    np.testing.assert_array_equal(theorems.vote(gradients), np.sign(np.sign(gradients).sum(axis=0)))


@pytest.mark.parametrize("problem", theorems.PROBLEMS, ids=lambda problem: problem.name)
def test_bounds_are_those_of_the_theorems(problem: theorems.Problem) -> None:
    steps, beta = 70, 0.9
    l1, s1 = problem.curvature.sum(), problem.deviation.sum()
    f0 = problem.objective(theorems.start(1))
    one, several = (theorems.theorem_1_or_2(problem, steps, workers, 2) for workers in (1, 9))
    n = steps**2
    assert one.bound**2 == pytest.approx((math.sqrt(l1) * (f0 + 0.5) + 2 * s1) ** 2 / math.sqrt(n))
    gain = 1 if problem.skewed else 3
    assert several.bound**2 == pytest.approx((math.sqrt(l1) * (f0 + 0.5) + 2 * s1 / gain) ** 2 / math.sqrt(n))
    assert [one.theorem, several.theorem] == ["1", "2(a)" if problem.skewed else "2(b)"]
    with_momentum = theorems.theorem_3(problem, steps, beta, 2)
    delta = 1 / math.sqrt(l1)
    total = 0.0
    for k in range(signum_warmup_steps(beta), steps):
        error = 2 / math.sqrt(k + 1) * (8 * l1 * delta * beta / (1 - beta) + math.sqrt(3) * s1 * math.sqrt(1 - beta))
        rate = delta / math.sqrt(k + 1)
        total += 2 * rate * error + rate**2 * l1 / 2
    counted = steps - signum_warmup_steps(beta)
    without_start = total / (counted * delta / math.sqrt(steps))
    with_all_of_it = without_start + f0 / (counted * delta / math.sqrt(steps))
    assert without_start < with_momentum.bound < with_all_of_it
    for run in (one, several, with_momentum):
        assert len(run.measured) == 2
        assert 0 < run.mean < run.bound


def test_the_exponent_is_that_of_the_longer_runs() -> None:
    runs = [theorems.Run("1", "dense", 1, 0.0, k, [3 * k**-0.5], 1.0) for k in (300, 1000, 3000)]
    short = theorems.Run("1", "dense", 1, 0.0, 30, [100.0], 1.0)
    assert theorems.exponent([short, *runs]) == pytest.approx(-0.5)
    assert theorems.exponent([short, runs[0]]) is None


# -- Votes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_binomial_tail(workers: int, q: float) -> None:
    expected = 0.0
    for wrong in itertools.product((0, 1), repeat=workers):
        probability = math.prod(q if one else 1 - q for one in wrong)
        expected += probability * (1.0 if 2 * sum(wrong) > workers else 0.5 if 2 * sum(wrong) == workers else 0.0)
    assert known_noise.binomial_tail(workers, q) == pytest.approx(expected)


def test_lemma_d1() -> None:
    edge = 2 / math.sqrt(3)
    assert known_noise.lemma_d1(edge) == pytest.approx(1 / 6)
    assert known_noise.lemma_d1(math.nextafter(edge, 2)) == pytest.approx(1 / 6)
    assert known_noise.lemma_d1(0.0) == 0.5
    assert known_noise.lemma_d1(2.0) == pytest.approx(1 / 18)
    for noise, ratio in itertools.product(known_noise.NOISES, np.linspace(0.01, 4.0, 100)):
        assert noise.tail(ratio) <= known_noise.lemma_d1(ratio) * (1 + 1e-12)
        for workers in known_noise.WORKERS:
            assert known_noise.binomial_tail(workers, noise.tail(ratio)) <= known_noise.theorem_2b(ratio, workers)


@pytest.mark.parametrize("noise", known_noise.NOISES, ids=lambda noise: noise.name)
def test_known_noise_has_unit_deviation_and_its_tail(noise: known_noise.Noise) -> None:
    drawn = noise.draw(np.random.default_rng(0), (100, 2000))
    assert drawn.dtype == np.float32
    assert drawn.mean() == pytest.approx(0.0, abs=0.01)
    assert drawn.std() == pytest.approx(1.0, abs=0.01)
    for s in (0.1, 1.0, 1.6):
        assert (drawn > s).mean() == pytest.approx(noise.tail(s), abs=0.005)


def test_measured_votes_are_binomial_and_skew_hurts() -> None:
    rates = known_noise.known_noise(2**11)
    assert len(rates) == len(known_noise.NOISES) * len(known_noise.RATIOS) * len(known_noise.WORKERS)
    skewed = known_noise.skewed_noise(2**11)
    for one in (*rates, *skewed):
        assert one.measured == pytest.approx(one.exact, abs=5 * one.error), one
    alone, together = (
        next(one.measured for one in skewed if (one.noise, one.workers) == ("two values, batch 1", workers))
        for workers in (1, 15)
    )
    assert 0.85 < alone < 0.95 < together


def test_noise_of_a_voted_gaussian() -> None:
    for ratio in (0.05, 0.7):
        assert real_gradient.noise_of(NormalDist().cdf(-ratio), ratio) == pytest.approx(1.0)
        assert real_gradient.noise_of(NormalDist().cdf(-2 * ratio), ratio) == pytest.approx(0.5)
    assert math.isnan(real_gradient.noise_of(0.0, 1.0))
    assert math.isnan(real_gradient.noise_of(0.5, 1.0))
    assert real_gradient.exponent([1 / math.sqrt(workers) for workers in known_noise.ODD]) == pytest.approx(-0.5)


# -- Figures 1 and 2 --------------------------------------------------------------------------------------------------


def test_a_snapshot_is_that_of_the_full_gradient() -> None:
    torch.manual_seed(0)
    model = Transformer(layers=1, width=16, context=64)
    pieces = torch.randint(256, (4 * figures_1_2.SEQUENCES, 65))
    found = figures_1_2.snapshot(model, pieces, 3)
    loss = figures_1_2.backward(model, pieces)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert found.epoch == 3
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.gradient_density == pytest.approx(density(gradient), rel=1e-3)
    assert found.coordinates == gradient.numel()
