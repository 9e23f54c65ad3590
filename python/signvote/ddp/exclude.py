"""What ``exclude=`` means: which parameters have an ordinary mean in place of a vote."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

Predicate: TypeAlias = Callable[[str, torch.Tensor], bool]
# Of strings and predicates, also in any iterable.
Exclude: TypeAlias = str | Predicate | Iterable[str | Predicate] | None


def resolve(exclude: Exclude, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """The names that ``exclude`` selects, in the order of the model.

    Args:
        exclude: A parameter's name; a pattern as in :mod:`fnmatch` (``"*.bias"``, ``"layers.[01].*"``), with a
            difference between upper and lower case; a predicate, called with each name and parameter; or an iterable
            of these, which selects what any of them selects. None selects nothing.
        named_parameters: ``model.named_parameters()``.

    Raises:
        TypeError: If ``exclude`` is none of these.
        ValueError: If a name or pattern selects nothing, which is taken for a slip. A predicate may select nothing.
    """
    named = list(named_parameters)
    selected: set[str] = set()
    for rule in _rules(exclude):
        if isinstance(rule, str):
            selected.update(_matches(rule, [name for name, _ in named]))
        else:
            selected.update(name for name, parameter in named if rule(name, parameter))
    return [name for name, _ in named if name in selected]


def _rules(exclude: Exclude) -> list[str | Predicate]:
    if exclude is None:
        return []
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        exclude = [exclude]
    rules: list[str | Predicate] = list(exclude)
    for rule in rules:
        # A module could be called too: with names.
        if isinstance(rule, nn.Module) or not (isinstance(rule, str) or callable(rule)):
            raise TypeError(
                "exclude: expected names, patterns and functions of name and parameter, or an iterable of them, got "
                f"{type(rule).__name__}"
            )
    return rules


def _matches(rule: str, names: list[str]) -> list[str]:
    if rule in names:  # a name may hold any character but a dot, also those of a pattern
        return [rule]
    matches = [name for name in names if fnmatchcase(name, rule)]
    if not matches:
        inside = [name for name in names if name.startswith(f"{rule}.")]
        if inside:
            hint = f"; for all parameters of that module, {rule + '.*'!r}"
        else:
            close = difflib.get_close_matches(rule, names)
            hint = f"; close to it: {', '.join(map(repr, close))}" if close else ""
        raise ValueError(f"exclude: {rule!r}: expected the name of a parameter or a pattern that matches some{hint}")
    return matches


# -- Kinds of parameters, by name --------------------------------------------------------------------------------------
# Lists of names rather than predicates: neither name nor shape tells what kind of module a parameter belongs to.


def vectors(model: nn.Module) -> list[str]:
    """Names of the parameters with fewer than two dimensions: biases, scales, the weights of norms."""
    return [name for name, parameter in _named(model) if parameter.ndim < 2]


def biases(model: nn.Module) -> list[str]:
    """Names of the parameters that are called a bias, such as ``bias``, ``in_proj_bias`` or ``bias_hh_l0``."""
    return [name for name, _ in _named(model) if "bias" in name.rpartition(".")[2]]


def norms(model: nn.Module) -> list[str]:
    """Names of the parameters of norms: modules with the word ``Norm`` in the name of their class, as ``LayerNorm``,
    ``BatchNorm2d`` and ``LlamaRMSNorm`` have it. No class is common to all of them.
    """
    return _owned(model, lambda module: re.search("Norm(?![a-z])", type(module).__name__) is not None)


def embeddings(model: nn.Module) -> list[str]:
    """Names of the parameters of ``torch.nn.Embedding`` and ``EmbeddingBag``, also where an output layer shares them.

    Not those of embeddings that are bare parameters, as those for positions often are.
    """
    return _owned(model, lambda module: isinstance(module, nn.Embedding | nn.EmbeddingBag))


def _owned(model: nn.Module, is_owner: Callable[[nn.Module], bool]) -> list[str]:
    owned = {
        id(parameter)
        for module in model.modules()
        if is_owner(module)
        for parameter in module.parameters(recurse=False)
    }
    return [name for name, parameter in _named(model) if id(parameter) in owned]


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters under the names that a state knows, which are those in the model that DDP wraps."""
    return (model.module if isinstance(model, DistributedDataParallel) else model).named_parameters()
