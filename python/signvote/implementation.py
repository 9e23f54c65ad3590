"""Which of the CPU's implementations the ops take, and on how many threads."""

from __future__ import annotations

import functools
import os
from typing import SupportsIndex

import torch

from signvote import _core


def implementations() -> list[str]:
    """Names of the implementations that this CPU can run, best first."""
    return _core.implementations()


@functools.cache
def default_implementation() -> str:
    """The implementation that ops take unless told: ``SIGNVOTE_IMPLEMENTATION`` if it is set, otherwise the best.

    The environment is read once, at the first use.

    Raises:
        ValueError: ``SIGNVOTE_IMPLEMENTATION`` names none of :func:`implementations`.
    """
    names = _core.implementations()
    name = os.environ.get("SIGNVOTE_IMPLEMENTATION") or names[0]
    if name not in names:
        raise ValueError(f"SIGNVOTE_IMPLEMENTATION is {name!r}, expected one of {', '.join(map(repr, names))}")
    return name


def choices(implementation: str | None, num_threads: SupportsIndex | None) -> tuple[str, SupportsIndex]:
    """The implementation and the number of threads, or what takes their place where they are None."""
    return implementation or default_implementation(), torch.get_num_threads() if num_threads is None else num_threads
