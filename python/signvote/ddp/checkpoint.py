"""What a rank saves, and what it refuses to load."""

import math
from collections.abc import Mapping
from typing import Any

import torch

FORMAT = 1

_KEYS = {"format", "rank", "world_size", "step", "seed", "parameters", "momentum"}
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
    for number in ("step", "seed"):
        value = state_dict[number]
        if not isinstance(value, int) or not 0 <= value < 2**64:
            raise ValueError(f"load_state_dict: {number}: expected an integer from 0 to 2**64 - 1, got {value!r}")
    momentum = state_dict["momentum"]
    if not isinstance(momentum, Mapping) or not all(isinstance(value, torch.Tensor) for value in momentum.values()):
        raise ValueError("load_state_dict: momentum: expected a dict of tensors")


def check_rank(state_dict: Mapping[str, Any], rank: int, world_size: int) -> None:
    for what, ours in (("world_size", world_size), ("rank", rank)):
        if state_dict[what] != ours:
            raise ValueError(
                f"load_state_dict: {what}: expected {ours}, as in this job, got {state_dict[what]}: momentum belongs "
                f"to the rank that gathered it, so each rank loads what it saved. {_REMEDY}"
            )


def check_momentum(
    state_dict: Mapping[str, Any], shapes: Mapping[str, torch.Size], *, expects_momentum: bool, any_trained: bool
) -> None:
    """The checkpoint is of the model whose parameters have these ``shapes``.

    A parameter may be without momentum: one that is frozen, or of which DDP has shown no gradient yet; all of them if
    none is trained by votes, or if the job takes means for good.
    """
    momentum: Mapping[str, torch.Tensor] = state_dict["momentum"]
    switch = state_dict.get("switch") or {}
    has_voted = 0 < state_dict["step"] < (switch.get("switched_at") or math.inf)
    if momentum and not expects_momentum:
        raise ValueError(
            f"load_state_dict: momentum: expected none (momentum=0.0), got {len(momentum)} tensors. {_REMEDY}"
        )
    if expects_momentum and any_trained and has_voted and not momentum:
        raise ValueError(f"load_state_dict: momentum: expected tensors, got none. {_REMEDY}")
    saved = [*state_dict["parameters"], *momentum]
    unknown = [name for name in dict.fromkeys(saved) if name not in shapes]
    missing = [name for name in shapes if name not in state_dict["parameters"]]
    if unknown or missing:
        raise ValueError(
            "load_state_dict: parameters: expected the names of this model's parameters; "
            f"unknown: {unknown or 'none'}, missing: {missing or 'none'}. {_REMEDY}"
        )
    for name, tensor in momentum.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"load_state_dict: momentum of {name}: expected shape {tuple(shapes[name])}, "
                f"got {tuple(tensor.shape)}. {_REMEDY}"
            )
