"""What a rank saves, and what it refuses to load."""

from collections.abc import Mapping
from typing import Any

import torch

FORMAT = 1

_KEYS = {"format", "rank", "world_size", "step", "seed", "momentum"}
_REMEDY = (
    "reset_momentum=True takes over the step and the seed and starts with zero momentum, "
    "which is back after some 1/(1 - beta) steps"
)


def check_format(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping) or not set(state_dict) >= _KEYS:
        got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(f"load_state_dict: state_dict: expected a dict with {sorted(_KEYS)}, got {got}")
    if state_dict["format"] != FORMAT:
        raise ValueError(f"load_state_dict: format: expected {FORMAT}, got {state_dict['format']}")


def check_rank(state_dict: Mapping[str, Any], rank: int, world_size: int) -> None:
    for what, ours in (("world_size", world_size), ("rank", rank)):
        if state_dict[what] != ours:
            raise ValueError(
                f"load_state_dict: {what}: expected {ours}, as in this job, got {state_dict[what]}: momentum belongs "
                f"to the rank that gathered it, so each rank loads what it saved. {_REMEDY}"
            )


def check_momentum(
    saved: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor], expects_momentum: bool, step: int
) -> None:
    """``saved`` has momentum for just those of ``parameters`` that train, in their shapes."""
    if saved and not expects_momentum:
        raise ValueError(
            f"load_state_dict: momentum: expected none (momentum=0.0), got {len(saved)} tensors. {_REMEDY}"
        )
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    unknown = [name for name in saved if name not in parameters]
    missing = [name for name in trained if name not in saved] if expects_momentum and step > 0 else []
    if unknown or missing:
        raise ValueError(
            "load_state_dict: momentum: expected the names of this model's parameters; "
            f"unknown: {unknown or 'none'}, missing: {missing or 'none'}. {_REMEDY}"
        )
    for name, momentum in saved.items():
        if momentum.shape != parameters[name].shape:
            raise ValueError(
                f"load_state_dict: momentum of {name}: expected shape {tuple(parameters[name].shape)}, "
                f"got {tuple(momentum.shape)}. {_REMEDY}"
            )
