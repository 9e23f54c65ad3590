"""What is measured: for each op its data, its contenders and how their results are checked.

``data`` and ``field`` are what all cases are made of; ``signs``, ``ternary`` and ``hook`` build them.
"""

from __future__ import annotations

from collections.abc import Callable

from signvote.cli.bench.cases import hook, signs, ternary
from signvote.cli.bench.cases.data import Data
from signvote.cli.bench.cases.field import Case, Options
from signvote.cli.bench.cases.hook import hook_bytes
from signvote.cli.bench.measure import Contender

__all__ = ["DTYPES", "OPS", "ROWS", "TERNARY_ROWS", "Case", "Data", "Options", "contenders", "hook_bytes"]

DTYPES = ("float32", "float64", "float16", "bfloat16")
ROWS = (2, 3, 4, 5, 7, 8, 15, 16, 31, 32, 63, 64, 256)
TERNARY_ROWS = (2, 3, 4, 8, 16, 64)

_BUILDERS: dict[str, Callable[[Case, Data, Options], tuple[list[Contender], int]]] = {
    "pack_signs": signs.pack_signs,
    "pack_momentum": signs.pack_momentum,
    "unpack_signs": signs.unpack_signs,
    "majority_vote": signs.majority_vote,
    "pack_ternary": ternary.pack_ternary,
    "unpack_ternary": ternary.unpack_ternary,
    "majority_vote_ternary": ternary.majority_vote_ternary,
    "codec": hook.codec,
    "round_trip": hook.round_trip,
}
OPS = tuple(_BUILDERS)


def contenders(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    """Those of a case, and how many bytes each of them must move."""
    return _BUILDERS[case.op](case, data, options)
