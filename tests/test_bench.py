"""`signvote bench` on sizes that are measured at once: what it checks, prints and writes; not how fast anything is."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reference
import signvote
from signvote import _limits, ops
from signvote.cli import bench, main
from signvote.cli.bench import bars, expected, measure, peers, report, results
from signvote.cli.bench.measure import Contender, Spread
from signvote.cli.bench.results import Result

ROOT = Path(__file__).parent.parent
SMALL = ["--size", "0.01", "--rows", "3", "8", "--threads", "1", "2"]


@pytest.fixture(autouse=True)
def _fewest_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-5)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, Path]:
    """What a run printed, and the folder it wrote."""
    assert main(["bench", *SMALL, "--out", str(tmp_path)]) == 0
    return capsys.readouterr().out, tmp_path


def test_run_shows_and_writes_all_there_is(run: tuple[str, Path]) -> None:
    printed, folder = run
    for name in ("bandwidth.png", "votes.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for name in signvote.implementations():
        for what in ("pack_signs bfloat16", "pack_signs float32 zeros", "unpack_signs float64", "majority_vote M=8"):
            lines = [line for line in printed.splitlines() if line.split("  ")[0] == what and f" 1  {name} " in line]
            assert len(lines) == 1
            assert re.search(name + r" +[\d.]+ +[\d.]+ +\d\.\d\d  \d\.\d\d-\d\.\d\d", lines[0])

    facts, measured = results.read(folder / "bench.json")
    assert facts["machine"]["cpu"]
    assert {"signvote", "numpy", "torch", "python"} == facts["versions"].keys()
    cases = {(r.op, r.dtype, r.zeros, r.rows) for r in measured}
    assert len(cases) == 6 * 4 + 2 * 2 + 1
    for r in measured:
        assert 0 < r.seconds.low <= r.seconds.median <= r.seconds.high
        assert r.samples >= 3
        assert ("limit" in r.ratios) == (r.kind == "op")
    kinds = {(r.kind, r.name) for r in measured if r.op == "majority_vote"}
    assert {("limit", "xor_rows"), ("limit", "read_rows_then_write"), ("peer", "numpy"), ("peer", "torch")} < kinds


def test_only_what_is_asked_for_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "new" / "quick.json"
    options = ["--quick", "--size", "0.01", "--op", "pack_signs", "--dtype", "float16", "--implementation", "portable"]
    command = [sys.executable, str(ROOT / "bench" / "bench_ops.py"), *options, "--json", str(path)]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assert [file.name for file in tmp_path.iterdir()] == ["new"]
    _, measured = results.read(path)
    assert {(r.op, r.dtype) for r in measured} == {("pack_signs", "float16")}
    assert {r.name for r in measured if r.kind == "op"} == {"portable"}


@pytest.mark.parametrize(
    ("module", "name", "out", "message"),
    [
        (ops, "pack_signs", "out", "pack_signs float32 0.01 MB: "),
        (ops, "pack_momentum", "out", "pack_momentum float32 0.01 MB: "),
        (ops, "unpack_signs", "out", "unpack_signs float32 0.01 MB: "),
        (ops, "majority_vote", "out", "majority_vote M=8 0.01 MB: "),
        (ops, "pack_ternary", "out", "pack_ternary float32 0.01 MB: "),
        (ops, "unpack_ternary", "out", "unpack_ternary float32 0.01 MB: "),
        (ops, "majority_vote_ternary", "out", "majority_vote_ternary M=8 0.01 MB: "),
        (peers, "numpy_unpack", 2, "unpack_signs float32 0.01 MB: numpy"),
    ],
)
def test_wrong_result_ends_the_run(
    module: Any, name: str, out: Any, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right: Callable[..., Any] = getattr(module, name)

    def wrong(*arguments: Any, **options: Any) -> None:
        right(*arguments, **options)
        written = options[out] if isinstance(out, str) else arguments[out]
        written.reshape(-1).view(np.uint8)[40] ^= 1

    monkeypatch.setattr(module, name, wrong)
    op = ["--op", "unpack_signs" if module is peers else name, "--dtype", "float32"]
    assert main(["bench", *SMALL, *op]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"signvote bench: wrong result: {message}")
    assert ": 1 of " in error
    assert error.endswith("items are wrong, the first at 10\n")


def test_wrong_momentum_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ops.pack_momentum

    def wrong(x: Any, momentum: Any, **options: Any) -> None:
        right(x, momentum, **options)
        momentum[7] = np.nextafter(momentum[7], 1, dtype=np.float32)

    monkeypatch.setattr(ops, "pack_momentum", wrong)
    assert main(["bench", "--quick", *SMALL, "--op", "pack_momentum"]) == 1
    assert "1 of 2496 items are wrong, the first at 7" in capsys.readouterr().err


def test_a_run_is_compared_with_another(run: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = run[1] / "bench.json"
    document = json.loads(path.read_text())
    for result in document["results"]:
        if result["op"] == "majority_vote" and result["kind"] == "op":
            result["ratios"]["limit"] = {"median": 1e6, "low": 1e6, "high": 1e6}
    document["machine"]["cpu"] = "Z80"
    path.write_text(json.dumps(document))
    assert main(["bench", "--quick", *SMALL, "--op", "majority_vote", "--compare", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "cpu: Z80 before, " in printed
    assert "majority_vote M=3 0.01 MB: " in printed
    assert "-100% slower" in printed


def test_a_run_in_other_pages_is_not_compared(run: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = run[1] / "bench.json"
    document = json.loads(path.read_text())
    now = document["machine"]["pages"]
    document["machine"]["pages"] = "64 MB pages"
    path.write_text(json.dumps(document))
    with pytest.raises(SystemExit):
        main(["bench", "--quick", *SMALL, "--compare", str(path)])
    assert f"bench.json: expected a run in {now}, as this one, got 64 MB pages" in capsys.readouterr().err


def test_bad_file_to_compare_with_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.json"
    for text, message in (
        ("{", "is not a file of signvote bench: JSONDecodeError"),
        ('{"format": 1}', "has format 1, expected 2"),
        ("{}", "is not a file of signvote bench: KeyError: 'format'"),
        ('{"format": 0}', "has format 0, expected 2"),
        (None, "No such file"),
    ):
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(SystemExit):
            main(["bench", "--compare", str(path)])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "0"], "argument --size: expected a number above 0"),
        (["--rows", "65536"], "argument --rows: expected 1 to 65535, got 65536"),
        (["--implementation", "mmx"], "argument --implementation: invalid choice: 'mmx'"),
        (["--op", "codec", "--dtype", "float64"], "these options leave nothing to measure"),
    ],
)
def test_bad_option_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_there_are_no_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ["--size", "0.01", "--op", "pack_signs", "--dtype", "float32", "--out", str(tmp_path)]
    assert main(["bench", *options]) == 0
    assert capsys.readouterr().err == "signvote bench: no plots without matplotlib: pip install 'signvote[bench]'\n"
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


class Clock:
    """Only what is timed takes time."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        return self.now


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-3)
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    calls: list[str] = []

    def contender(name: str, milliseconds: float) -> Contender:
        def call() -> None:
            calls.append(name)
            clock.now += round(milliseconds * 1e6)

        return Contender("op", name, 1, call)

    fast, twice, slow, short = field = [
        contender("fast", 20),
        contender("twice", 40),
        contender("slow", 2000),
        contender("short", 0.25),
    ]
    measure.take_turns(field, 1.0)
    assert short.calls == 4
    assert [fast.calls, twice.calls, slow.calls] == [1, 1, 1]
    assert list(short.samples) == list(range(measure.MAX_ROUNDS))
    assert len(slow.samples) == measure.MIN_SAMPLES
    assert fast.spread() == Spread(0.02, 0.02, 0.02)
    assert measure.times_faster(short, twice).median == pytest.approx(160)
    estimates = 1 + 1 + 1 + 3
    assert calls[estimates:].count("short") == measure.MAX_ROUNDS * (1 + 4)  # an untimed one in each round


def test_ratio_is_taken_between_neighbours_in_time() -> None:
    op = Contender("op", "op", 1, int, samples={0: 1.0, 1: 2.0, 2: 4.0})
    limit = Contender("limit", "limit", 1, int, samples={0: 0.5, 2: 2.0})
    assert measure.times_faster(op, limit).median == 0.5  # 1.0 and 4.0 are half as fast


def some_result(**changes: Any) -> Result:
    same = Spread(0.96, 0.95, 0.97)
    result = Result(
        op="pack_signs",
        dtype="float32",
        zeros="none",
        rows=None,
        megabytes=26,
        coordinates=6_500_000,
        kind="op",
        name="avx512",
        threads=1,
        bytes=26_000_000,
        seconds=Spread(1e-3, 1e-3, 1e-3),
        samples=25,
        calls=1,
        gigabytes_per_second=26,
        nanoseconds_per_coordinate=1 / 6.5,
        limit="read",
        ratios={"limit": same},
    )
    return replace(result, **changes)


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({}, 0.95),
        ({"dtype": "bfloat16"}, 0.9),
        ({"zeros": "third"}, 0.8),
        ({"op": "unpack_signs", "limit": "write"}, 0.95),
        ({"op": "pack_momentum", "limit": "update"}, 0.9),
    ],
)
def test_bar_of_an_op(changes: dict[str, Any], least: float) -> None:
    for median, met in ((least, True), (least - 0.01, False)):
        ratios = {"limit": Spread(median, median - 0.02, median + 0.02)}
        (bar,) = bars.judge([some_result(**changes, ratios=ratios)], "avx512")
        assert (bar.least, bar.met, bar.sure) == (least, met, False)
    assert bars.judge([some_result(**changes, megabytes=1)], "avx512") == []
    assert bars.judge([some_result(**changes, name="avx2")], "avx512") == []


def test_bar_shows_what_the_other_plain_loop_reaches() -> None:
    vote = some_result(op="majority_vote", rows=3, limit="xor_rows", ratios={"limit": Spread(0.9, 0.88, 0.92)})
    xor = replace(vote, kind="limit", name="xor_rows", ratios={})
    read = replace(xor, name="read_rows_then_write", seconds=Spread(2e-3, 2e-3, 2e-3))
    (bar,) = bars.judge([vote, xor, read], "avx512")
    assert (bar.least, bar.met, bar.sure) == (0.9, True, False)
    assert bar.note == "plain XOR of the rows; plain read of the rows, then write: 0.50"
    unpack = some_result(op="unpack_signs", dtype="bfloat16", limit="write")
    write = replace(unpack, kind="limit", name="write", ratios={})
    repeat = replace(write, name="repeat", seconds=Spread(2e-3, 2e-3, 2e-3))
    (bar,) = bars.judge([unpack, write, repeat, read], "avx512")
    assert bar.note == "plain write; plain write of the words over and over: 0.50"


def test_limit_that_repeats_words() -> None:
    words = np.arange(1000, dtype=np.uint32)
    for times in (16, 32, 48):
        out = np.zeros(times * words.size, np.uint32)
        _limits.repeat(words, out)
        np.testing.assert_array_equal(out, np.repeat(words, times))
    for size in (0, 999, 8 * words.size, 17 * words.size):
        with pytest.raises(ValueError, match="times as long as x"):
            _limits.repeat(words, np.zeros(size, np.uint32))


def test_pages_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = importlib.import_module("signvote.cli.bench.machine")  # a function of its name hides it
    for setting, asked, found in (
        ("always [madvise] never", None, "16 KB pages"),
        ("always [madvise] never", "1", "huge pages"),
        ("[always] madvise never", None, "huge pages"),
        ("always madvise [never]", "1", "16 KB pages"),
    ):
        monkeypatch.setattr(machine, "lines", lambda path, setting=setting: [setting])
        monkeypatch.setattr(machine.mmap, "PAGESIZE", 16384)
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
        if asked:
            monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", asked)
        assert machine.pages() == found


def test_bar_against_numpy_shows_what_the_limit_reaches() -> None:
    op = some_result(ratios={"numpy": Spread(2, 1.9, 2.1)}, limit="read")
    limit = some_result(kind="limit", name="read", ratios={})
    numpy = some_result(kind="peer", name="numpy", ratios={}, seconds=Spread(3e-3, 3e-3, 3e-3))
    bar = bars.judge([replace(op, ratios={"limit": Spread(1, 1, 1), **op.ratios}), limit, numpy], "avx512")[-1]
    assert (bar.group, bar.least, bar.met, bar.note) == ("against numpy", 1.4, True, "plain read: 3.00")


def test_bar_of_two_threads_shows_what_they_bring_the_limit() -> None:
    op = some_result(threads=2, ratios={"limit": Spread(1, 1, 1), "one thread": Spread(1.8, 1.8, 1.8)})
    limit = some_result(kind="limit", name="read", threads=2, ratios={"one thread": Spread(1.9, 1.9, 1.9)})
    (bar,) = bars.judge([op, limit], "avx512")
    assert (bar.least, bar.met, bar.note) == (1.7, True, "plain read: 1.90")
    assert bars.judge([replace(op, coordinates=999_999), limit], "avx512") == []


def test_bar_of_the_codec_counts_a_copy_and_a_quarter_of_a_nanosecond() -> None:
    codec = some_result(op="codec", threads=2, seconds=Spread(6.5e-3 * 0.35, 2e-3, 3e-3))
    copy = some_result(op="codec", kind="limit", name="copy", threads=2, nanoseconds_per_coordinate=0.5, ratios={})
    (bar,) = bars.judge([codec, copy], "avx512")
    assert bar.note == "0.350 ns per coordinate; allowed 0.2 x 0.500 + 0.25 = 0.350"
    assert bar.measured.median == pytest.approx(1)


def test_what_changed_is_told_from_noise() -> None:
    old = [some_result(), some_result(megabytes=256), some_result(kind="limit", name="read", ratios={})]
    assert report.compare(old, old).startswith("0 of 2 ops changed by more than the noise.\n0 of 1 limits and peers")
    slower = replace(old[0], ratios={"limit": Spread(0.48, 0.475, 0.485)})
    noisy = replace(old[1], ratios={"limit": Spread(0.86, 0.5, 1.0)})
    limit = replace(old[2], seconds=Spread(2e-3, 2e-3, 2e-3))
    text = report.compare(old, [slower, noisy, limit])
    assert text.startswith("1 of 2 ops changed")
    assert "1 of 1 limits and peers take another time" in text
    assert "pack_signs float32 26 MB: avx512" in text
    assert "-50% slower" in text
    assert report.compare(old, []) == "The two runs have no op in common."


def test_expected_results_are_those_of_the_reference() -> None:
    rng = np.random.default_rng(1)
    numel = 32 * 101
    x = rng.standard_normal(numel, np.float32)
    x[rng.random(numel) < 0.3] = 0
    np.testing.assert_array_equal(expected.pack_signs(x, 7), reference.pack_signs(x, "coin", 7)[0])
    rows = rng.integers(0, 2**32, (8, 101), np.uint32)
    expected.check_vote("vote", reference.majority_vote(list(rows), numel, "coin", 7)[0], rows, numel, 7)
    expected.check_vote("vote", reference.majority_vote(list(rows), numel, "negative")[0], rows, numel, None)
    x[:2] = 0.5, -0.5
    np.testing.assert_array_equal(expected.pack_ternary(x, 0.5), reference.pack_ternary(x, 0.5)[0])
    ballots = rows.reshape(4, 2, 101)
    voted = reference.majority_vote_ternary(ballots, numel, 2)[0]
    expected.check_vote_ternary("vote", voted, ballots, numel, 2)
    expected.check_unpacked_ternary("unpack", reference.unpack_ternary(voted, numel, np.float16(0.5)), voted, 0.5)
    expected.check_unpacked("unpack", reference.unpack_signs(rows[0], numel, np.float16(0.5)), rows[0], 0.5)


@pytest.mark.parametrize("size", [1, 15, 64, 1000, 3 * 8192 + 7])
def test_limits_touch_every_word(size: int) -> None:
    rng = np.random.default_rng(2)
    for num_rows in (1, 2, 7, 15, 16, 17, 35):
        rows = list(rng.integers(0, 2**32, (num_rows, size), np.uint32))
        out = np.zeros(size, np.uint32)
        _limits.xor_rows(rows, out)
        sum_of_rows = np.bitwise_xor.reduce(rows)
        np.testing.assert_array_equal(out, sum_of_rows)
        _limits.read_rows_then_write(rows, out)
        np.testing.assert_array_equal(out, np.bitwise_xor.reduce(sum_of_rows))
    assert _limits.read(rows[0]) == np.bitwise_xor.reduce(rows[0])
    _limits.copy(rows[0], out)
    np.testing.assert_array_equal(out, rows[0])
    _limits.update(rows[1], out)
    np.testing.assert_array_equal(out, rows[0] ^ rows[1])
    _limits.write(out, 5)
    assert (out == 5).all()
    twice = np.zeros(2 * size, np.uint32)
    _limits.update(rows[0], twice)
    assert np.count_nonzero(twice) == 2 * size
    np.testing.assert_array_equal(np.sort(twice), np.sort(np.repeat(rows[0], 2)))


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_share_the_words_of_a_limit(num_threads: int) -> None:
    size = (1 << 20) + 77  # enough for several threads
    rng = np.random.default_rng(3)
    rows = list(rng.integers(0, 2**32, (3, size), np.uint32))
    sum_of_rows = np.bitwise_xor.reduce(rows)
    out = np.zeros(size, np.uint32)
    assert _limits.read(rows[0], num_threads) == np.bitwise_xor.reduce(rows[0])
    _limits.xor_rows(rows, out, num_threads)
    np.testing.assert_array_equal(out, sum_of_rows)
    _limits.copy(rows[0], out, num_threads)
    np.testing.assert_array_equal(out, rows[0])
    _limits.update(rows[1], out, num_threads)
    np.testing.assert_array_equal(out, rows[0] ^ rows[1])
    twice = np.zeros(2 * size, np.uint32)
    _limits.update(rows[0], twice, num_threads)
    np.testing.assert_array_equal(np.sort(twice), np.sort(np.repeat(rows[0], 2)))
    _limits.write(out, 5, num_threads)
    assert (out == 5).all()
    _limits.read_rows_then_write(rows, out, num_threads)
    words_read = [np.bitwise_xor.reduce(part) for part in np.split(sum_of_rows, np.flatnonzero(np.diff(out)) + 1)]
    np.testing.assert_array_equal(out[[0, *(np.flatnonzero(np.diff(out)) + 1)]], words_read)


def test_limits_refuse_what_does_not_fit() -> None:
    x = np.zeros(8, np.uint32)
    for call in (
        lambda: _limits.copy(x, x[:4].copy()),
        lambda: _limits.update(x, np.zeros(9, np.uint32)),
        lambda: _limits.read(x[::2]),
        lambda: _limits.read(np.zeros(3, np.uint8)),
        lambda: _limits.xor_rows([], x),
        lambda: _limits.xor_rows([x, x[:4].copy()], x),
        lambda: _limits.write(np.frombuffer(bytes(8), np.uint32), 1),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
