from typing import Any, SupportsIndex, TypeAlias

from numpy.typing import NDArray

_Array: TypeAlias = NDArray[Any]
_Rows: TypeAlias = _Array | list[_Array]
_Int: TypeAlias = SupportsIndex
_Counts: TypeAlias = tuple[int, int]
_Coefficients: TypeAlias = tuple[float, float, float, float]

def implementations() -> list[str]: ...
def mix(x: _Int) -> int: ...
def pack_signs(
    x: _Array, dtype: str, zeros: str, seed: _Int, out: _Array, implementation: str, num_threads: _Int = 1
) -> _Counts: ...
def pack_momentum(
    x: _Array,
    dtype: str,
    momentum: _Array,
    coefficients: _Coefficients,
    zeros: str,
    seed: _Int,
    out: _Array,
    implementation: str,
    num_threads: _Int = 1,
) -> _Counts: ...
def has_nonfinite(x: _Array, dtype: str, implementation: str, num_threads: _Int = 1) -> bool: ...
def majority_vote(
    rows: _Rows, numel: _Int | None, ties: str, seed: _Int, out: _Array, implementation: str, num_threads: _Int = 1
) -> int: ...
def unpack_signs(
    words: _Array, numel: _Int, dtype: str, positive: int, out: _Array, implementation: str, num_threads: _Int = 1
) -> None: ...
def pack_runs(
    bucket: _Array,
    dtype: str,
    momentum: _Array | None,
    coefficients: _Coefficients,
    runs: _Array,
    zeros: str,
    seed: _Int,
    out: _Array,
    implementation: str,
    num_threads: _Int = 1,
) -> _Counts: ...
def vote_runs(
    rows: _Rows, runs: _Array, ties: str, seed: _Int, out: _Array, implementation: str, num_threads: _Int = 1
) -> int: ...
def unpack_runs(
    words: _Array, runs: _Array, dtype: str, positive: int, bucket: _Array, implementation: str, num_threads: _Int = 1
) -> None: ...
def pack_ternary(
    x: _Array, dtype: str, limit: int, out: _Array, implementation: str, num_threads: _Int = 1
) -> _Counts: ...
def majority_vote_ternary(
    rows: _Rows, numel: _Int | None, quorum: _Int, out: _Array, implementation: str, num_threads: _Int = 1
) -> int: ...
def unpack_ternary(
    planes: _Array, numel: _Int, dtype: str, positive: int, out: _Array, implementation: str, num_threads: _Int = 1
) -> None: ...
def pack_ternary_runs(
    bucket: _Array,
    dtype: str,
    limit: int,
    runs: _Array,
    stride: _Int,
    out: _Array,
    implementation: str,
    num_threads: _Int = 1,
) -> _Counts: ...
def vote_ternary_runs(
    rows: _Rows, runs: _Array, stride: _Int, quorum: _Int, out: _Array, implementation: str, num_threads: _Int = 1
) -> int: ...
def unpack_ternary_runs(
    words: _Array,
    runs: _Array,
    stride: _Int,
    dtype: str,
    positive: int,
    bucket: _Array,
    implementation: str,
    num_threads: _Int = 1,
) -> None: ...
def check_runs(op: str, runs: _Array, num_coordinates: _Int, num_words: _Int) -> None: ...
def tally_add(planes: _Array, words: _Array, weight: _Int, implementation: str, num_threads: _Int = 1) -> None: ...
def tally_add_ternary(
    planes: _Array, words: _Array, weight: _Int, implementation: str, num_threads: _Int = 1
) -> None: ...
def tally_merge(planes: _Array, others: _Array, implementation: str, num_threads: _Int = 1) -> None: ...
def tally_decide(
    planes: _Array,
    num_votes: _Int,
    numel_or_runs: _Int | _Array,
    ties: str,
    seed: _Int,
    out: _Array,
    implementation: str,
    num_threads: _Int = 1,
) -> int: ...
def tally_decide_ternary(
    planes: _Array,
    num_votes: _Int,
    quorum: _Int,
    numel_or_runs: _Int | _Array,
    stride: _Int,
    out: _Array,
    implementation: str,
    num_threads: _Int = 1,
) -> int: ...
def tally_counts(planes: _Array, numel: _Int, out: _Array) -> None: ...
