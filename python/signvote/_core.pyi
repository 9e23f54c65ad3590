from typing import Any, SupportsIndex

from numpy.typing import NDArray

def implementations() -> list[str]: ...
def mix(x: SupportsIndex) -> int: ...
def pack_signs(
    x: NDArray[Any],
    dtype: str,
    zeros: str,
    seed: SupportsIndex,
    out: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> tuple[int, int]: ...
def pack_momentum(
    x: NDArray[Any],
    dtype: str,
    momentum: NDArray[Any],
    coefficients: tuple[float, float, float, float],
    zeros: str,
    seed: SupportsIndex,
    out: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> tuple[int, int]: ...
def has_nonfinite(x: NDArray[Any], dtype: str, implementation: str, num_threads: SupportsIndex = 1) -> bool: ...
def majority_vote(
    rows: NDArray[Any] | list[NDArray[Any]],
    numel: SupportsIndex | None,
    ties: str,
    seed: SupportsIndex,
    out: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> int: ...
def unpack_signs(
    words: NDArray[Any],
    numel: SupportsIndex,
    dtype: str,
    positive: int,
    out: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> None: ...
def pack_runs(
    bucket: NDArray[Any],
    dtype: str,
    momentum: NDArray[Any] | None,
    coefficients: tuple[float, float, float, float],
    runs: NDArray[Any],
    zeros: str,
    seed: SupportsIndex,
    out: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> tuple[int, int]: ...
def vote_runs(
    rows: NDArray[Any] | list[NDArray[Any]],
    runs: NDArray[Any],
    ties: str,
    seed: SupportsIndex,
    out: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> int: ...
def unpack_runs(
    words: NDArray[Any],
    runs: NDArray[Any],
    dtype: str,
    positive: int,
    bucket: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> None: ...
def pack_ternary(
    x: NDArray[Any],
    dtype: str,
    limit: int,
    out: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> tuple[int, int]: ...
def majority_vote_ternary(
    rows: NDArray[Any] | list[NDArray[Any]],
    numel: SupportsIndex | None,
    quorum: SupportsIndex,
    out: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> int: ...
def unpack_ternary(
    planes: NDArray[Any],
    numel: SupportsIndex,
    dtype: str,
    positive: int,
    out: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> None: ...
def pack_ternary_runs(
    bucket: NDArray[Any],
    dtype: str,
    limit: int,
    runs: NDArray[Any],
    stride: SupportsIndex,
    out: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> tuple[int, int]: ...
def vote_ternary_runs(
    rows: NDArray[Any] | list[NDArray[Any]],
    runs: NDArray[Any],
    stride: SupportsIndex,
    quorum: SupportsIndex,
    out: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> int: ...
def unpack_ternary_runs(
    words: NDArray[Any],
    runs: NDArray[Any],
    stride: SupportsIndex,
    dtype: str,
    positive: int,
    bucket: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> None: ...
def check_runs(op: str, runs: NDArray[Any], num_coordinates: SupportsIndex, num_words: SupportsIndex) -> None: ...
def tally_add(
    planes: NDArray[Any],
    words: NDArray[Any],
    weight: SupportsIndex,
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> None: ...
def tally_add_ternary(
    planes: NDArray[Any],
    words: NDArray[Any],
    weight: SupportsIndex,
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> None: ...
def tally_merge(
    planes: NDArray[Any], others: NDArray[Any], implementation: str, num_threads: SupportsIndex = 1
) -> None: ...
def tally_decide(
    planes: NDArray[Any],
    num_votes: SupportsIndex,
    numel_or_runs: SupportsIndex | NDArray[Any],
    ties: str,
    seed: SupportsIndex,
    out: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> int: ...
def tally_decide_ternary(
    planes: NDArray[Any],
    num_votes: SupportsIndex,
    quorum: SupportsIndex,
    numel_or_runs: SupportsIndex | NDArray[Any],
    stride: SupportsIndex,
    out: NDArray[Any],
    implementation: str,
    num_threads: SupportsIndex = 1,
) -> int: ...
def tally_counts(planes: NDArray[Any], numel: SupportsIndex, out: NDArray[Any]) -> None: ...
