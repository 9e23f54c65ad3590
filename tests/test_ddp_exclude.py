"""What ``exclude=`` selects."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ranks import RankPool
from signvote.ddp.exclude import biases, embeddings, norms, resolve, vectors


class LlamaRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class NormalizedLinear(nn.Linear):
    """No norm, by whatever name."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 4)
        self.positions = nn.Parameter(torch.zeros(8, 4))
        self.layers = nn.Sequential(
            nn.Linear(4, 4), nn.LayerNorm(4), LlamaRMSNorm(), NormalizedLinear(4, 4, bias=False), nn.BatchNorm1d(4)
        )
        self.attention = nn.MultiheadAttention(4, 2)
        self.recurrent = nn.LSTM(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.tokens.weight
        self.gain = nn.Parameter(torch.ones(()))


NAMES = [name for name, _ in Model().named_parameters()]


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (None, []),
        ([], []),
        ("gain", ["gain"]),
        ("*.bias", ["layers.0.bias", "layers.1.bias", "layers.4.bias", "attention.out_proj.bias"]),
        ("layers.[12].weight", ["layers.1.weight", "layers.2.weight"]),
        (["layers.4.*", "gain", "layers.4.bias"], ["gain", "layers.4.weight", "layers.4.bias"]),
        ({"gain"}, ["gain"]),
        (lambda name, p: name.startswith("tok"), ["tokens.weight"]),
        (lambda name, p: p.ndim == 0, ["gain"]),
        (lambda name, p: False, []),
        (("positions", lambda name, p: p.ndim == 0), ["gain", "positions"]),
        ("*", NAMES),
    ],
)
def test_selects_in_the_order_of_the_model(exclude: Any, expected: list[str]) -> None:
    assert resolve(exclude, Model().named_parameters()) == sorted(expected, key=NAMES.index)


def test_a_name_comes_before_a_pattern() -> None:
    parameters = [(name, torch.zeros(2)) for name in ("a[0]", "a0", "A0", "b*", "bc")]
    assert resolve("a[0]", parameters) == ["a[0]"]
    assert resolve("b*", parameters) == ["b*"]
    assert resolve("a?", parameters) == ["a0"]  # on any system: case counts


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ("layers.0.wieght", r"'layers\.0\.wieght': expected .*; close to it: 'layers\.0\.weight'"),
        (["gain", "tokens"], r"'tokens': expected .*; for all parameters of that module, 'tokens\.\*'"),
        ("*.scale", r"'\*\.scale': expected the name of a parameter or a pattern that matches some"),
        ("", r"'': expected the name of a parameter"),
    ],
)
def test_a_string_that_matches_nothing_is_refused(exclude: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^exclude: {message}"):
        resolve(exclude, Model().named_parameters())


@pytest.mark.parametrize(("exclude", "got"), [(3, "int"), (["gain", None], "NoneType"), (nn.Linear(1, 1), "Linear")])
def test_other_things_are_refused(exclude: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"^exclude: expected names, patterns and functions .*, got {got}$"):
        resolve(exclude, Model().named_parameters())


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (norms, [f"layers.{i}.{what}" for i in (1, 2, 4) for what in ("weight", "bias") if (i, what) != (2, "bias")]),
        (embeddings, ["tokens.weight"]),
        (
            biases,
            [
                *(f"layers.{i}.bias" for i in (0, 1, 4)),
                "attention.in_proj_bias",
                "attention.out_proj.bias",
                "recurrent.bias_ih_l0",
                "recurrent.bias_hh_l0",
            ],
        ),
    ],
)
def test_kinds_of_parameters(select: Callable[[nn.Module], list[str]], expected: list[str]) -> None:
    assert Counter(select(Model())) == Counter(expected)
    assert resolve(select(Model()), Model().named_parameters()) == select(Model())


def test_vectors_are_what_has_no_matrix() -> None:
    model = Model()
    assert vectors(model) == [name for name, p in model.named_parameters() if p.ndim < 2]
    assert set(vectors(model)) == {"gain", *norms(model), *biases(model)}


def kinds_of_ddp() -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4))
    ddp = DistributedDataParallel(model)
    for select in (vectors, biases, norms, embeddings):
        assert select(ddp) == select(model) != []
        assert resolve(select(ddp), ddp.module.named_parameters()) == select(model)


def test_kinds_of_parameters_of_a_ddp_model_have_the_names_of_its_module(ranks: RankPool) -> None:
    ranks.run(kinds_of_ddp, world=1)
