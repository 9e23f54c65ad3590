"""What the commands and the benchmarks write as JSON."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """`value` with None for NaN and infinity, which JSON has not: a run that diverges leaves a file that loads."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
