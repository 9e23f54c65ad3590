"""The bars that the ops are held to, all of them ratios taken in one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from signvote.cli.bench.measure import Spread
from signvote.cli.bench.results import Result

LIMITS = {
    "read": "plain read",
    "write": "plain write",
    "repeat": "plain write of the words over and over",
    "update": "plain read of two, write of one",
    "xor_rows": "plain XOR of the rows",
    "read_rows_then_write": "plain read of the rows, then write",
    "copy": "plain copy",
    "transfer": "words to the host and back",
}
MANY_COORDINATES = 1_000_000  # from here on a second thread must pay
CUDA_MEGABYTES = 1024  # 256M coordinates
CUDA_OPS = ("pack_signs", "pack_momentum", "unpack_signs", "pack_ternary", "unpack_ternary")
CUDA_ROWS = (3, 8, 16, 64)  # of each vote
CODEC_COPY_SHARE = 0.2
CODEC_NANOSECONDS = 0.25


@dataclass(frozen=True)
class Bar:
    group: str
    what: str
    megabytes: float
    measured: Spread
    least: float
    note: str = ""

    @property
    def met(self) -> bool:
        return self.measured.median >= self.least

    @property
    def sure(self) -> bool:
        """The quartiles lie on one side."""
        return self.measured.low >= self.least or self.measured.high < self.least


def judge(results: Sequence[Result], best: str) -> list[Bar]:
    """Those that the results can answer, for the implementation ``best``."""
    ops = [result for result in results if result.kind == "op"]
    return [
        *_against_limits([op for op in ops if (op.name, op.threads) == (best, 1)], results),
        *_against_one_thread([op for op in ops if (op.name, op.threads) == (best, 2)], results),
        *_against_numpy([op for op in ops if (op.name, op.threads) == (best, 1)], results),
        *_avx2([op for op in ops if (op.name, op.threads) == ("avx2", 1)]),
        *_codec([op for op in ops if (op.name, op.threads) == (best, 2)], results),
    ]


def judge_cuda(results: Sequence[Result]) -> list[Bar]:
    """The same for ops on a CUDA device."""
    group = "on a CUDA device, against the fastest of plain copy, read and write"
    return [
        Bar(group, _what(op), op.megabytes, op.ratios["limit"], 0.9, LIMITS[op.limit or ""])
        for op in results
        if op.kind == "op"
        and op.megabytes >= CUDA_MEGABYTES
        and op.zeros == "none"
        and (op.op in CUDA_OPS or op.rows in CUDA_ROWS)
    ]


def _what(op: Result) -> str:
    return f"{op.op} M={op.rows}" if op.rows else f"{op.op} {op.dtype}"


def _against_limits(ops: Sequence[Result], results: Sequence[Result]) -> Iterator[Bar]:
    limits = [result for result in results if result.kind == "limit"]
    half = ("float16", "bfloat16")
    for op in ops:
        if op.megabytes < 26 or op.limit is None:
            continue
        if op.op in ("pack_signs", "pack_ternary") and op.zeros == "none":
            group, least = f"{op.op} against a plain read", 0.9 if op.dtype in half else 0.95
        elif op.op == "pack_signs":
            group, least = "pack_signs, a third of the coordinates zero, against a plain read", 0.8
        elif op.op in ("unpack_signs", "unpack_ternary"):
            group, least = f"{op.op} against a plain write", 0.95
        elif op.op == "pack_momentum" and op.dtype == "float32":
            group, least = "pack_momentum against a plain loop that reads two and writes one", 0.9
        elif op.op == "majority_vote":
            group, least = "majority_vote, ties by coin, against the faster plain loop over the same buffers", 0.9
        elif op.op == "majority_vote_ternary":
            group, least = "majority_vote_ternary against the faster plain loop over the same buffers", 0.9
        else:
            continue
        # What the other plain loop reaches shows how much of a miss is in the order of access, or in what it must read.
        same = {limit.name: limit for limit in limits if limit.key == replace(op, kind="limit", name=limit.name).key}
        others = [
            f"{LIMITS[name]}: {same[op.limit].seconds.median / limit.seconds.median:.2f}"
            for name, limit in same.items()
            if name != op.limit
        ]
        note = "; ".join([LIMITS[op.limit], *others]) if others else ""
        yield Bar(group, _what(op), op.megabytes, op.ratios["limit"], least, note)


def _against_one_thread(ops: Sequence[Result], results: Sequence[Result]) -> Iterator[Bar]:
    limits = {result.key: result for result in results if result.kind == "limit"}
    for op in ops:
        if op.coordinates >= MANY_COORDINATES and "one thread" in op.ratios and op.op != "codec":
            zeros = ", a third zeros" if op.zeros == "third" else ""
            limit = limits[replace(op, kind="limit", name=op.limit or "").key]
            note = f"{LIMITS[limit.name]}: {limit.ratios['one thread'].median:.2f}"
            yield Bar("two threads against one", _what(op) + zeros, op.megabytes, op.ratios["one thread"], 1.7, note)


def _against_numpy(ops: Sequence[Result], results: Sequence[Result]) -> Iterator[Bar]:
    others = {result.key: result for result in results if result.kind != "op"}
    least = {("pack_signs", None): 1.4, ("unpack_signs", None): 5, ("majority_vote", 3): 25, ("majority_vote", 8): 30}
    for op in ops:
        if op.megabytes >= 26 and op.dtype == "float32" and "numpy" in op.ratios and (op.op, op.rows) in least:
            numpy = others[replace(op, kind="peer", name="numpy").key]
            limit = others[replace(op, kind="limit", name=op.limit or "").key]
            note = f"{LIMITS[limit.name]}: {numpy.seconds.median / limit.seconds.median:.2f}"
            yield Bar("against numpy", _what(op), op.megabytes, op.ratios["numpy"], least[op.op, op.rows], note)


def _avx2(ops: Sequence[Result]) -> Iterator[Bar]:
    for op in ops:
        if op.megabytes == 26 and "avx512" in op.ratios and op.op != "codec":
            zeros = ", a third zeros" if op.zeros == "third" else ""
            yield Bar("AVX2 against AVX-512", _what(op) + zeros, op.megabytes, op.ratios["avx512"], 0.85)


def _codec(ops: Sequence[Result], results: Sequence[Result]) -> Iterator[Bar]:
    for op in ops:
        if op.op != "codec" or op.megabytes < 26:
            continue
        (copy,) = (
            other
            for other in results
            if (other.op, other.name, other.megabytes, other.threads) == ("codec", "copy", op.megabytes, op.threads)
        )
        copied = copy.nanoseconds_per_coordinate
        allowed = CODEC_COPY_SHARE * copied + CODEC_NANOSECONDS
        nanoseconds = [part / op.coordinates * 1e9 for part in (op.seconds.median, op.seconds.high, op.seconds.low)]
        note = (
            f"{nanoseconds[0]:.3f} ns per coordinate; "
            f"allowed {CODEC_COPY_SHARE} x {copied:.3f} + {CODEC_NANOSECONDS} = {allowed:.3f}"
        )
        spread = Spread(*(allowed / part for part in nanoseconds))
        group = "time allowed / time of pack + vote on a share + unpack, M=8, two threads"
        yield Bar(group, "codec float32", op.megabytes, spread, 1.0, note)
