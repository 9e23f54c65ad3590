"""`signvote plan`: what it takes, prints, writes and refuses; not how fast this machine is."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from signvote.cli import main, plan
from signvote.cli.plan import measure, report, units
from signvote.cli.plan.advise import WORTHWHILE, Cluster, advise
from signvote.cli.plan.model import Codec, Compute, Host, Link, ddp_buckets
from signvote.ddp.options import TOPOLOGIES

CODEC = Codec(pack=0.4e-9, vote=4e-12, unpack=0.2e-9, to_half=0.2e-9, from_half=0.2e-9)
HOST = Host(message_seconds=0.1e-3, byte_seconds=0.8e-9)
GPT2 = ["plan", "--params", "124M", "--workers", "16", "--link", "1gbit"]


@pytest.fixture
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_codec", lambda *arguments: CODEC)
    monkeypatch.setattr(measure, "measure_host", lambda: HOST)


def run(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main([*GPT2, *options]) == 0
    return capsys.readouterr().out


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COORDINATES", 1 << 16)
    monkeypatch.setattr(measure, "SENT_COORDINATES", 1 << 16)
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    for momentum in (0.9, 0.0):
        codec = measure.measure_codec(torch.bfloat16, momentum, 8)
        assert 0 < codec.vote < codec.pack
        assert min(codec.unpack, codec.to_half, codec.from_half) > 0
    host = measure.measure_host()
    assert 0 < host.message_seconds < 1
    assert 0 <= host.wake_seconds < 1
    assert host.byte_seconds >= 0 <= host.half_sum_seconds


def test_costs_are_told_apart() -> None:
    """Of known seconds: an all-reduce of few words is four messages; a pause, what a swap takes longer after it."""

    def all_reduce(numel: int, dtype: torch.dtype, rounds: int) -> float:
        size = numel * dtype.itemsize
        messages = 4 if numel == 4 else size / 2**20
        added = 3e-9 * numel / 2 if dtype == torch.float16 else 0.0
        return 1e-4 * messages + 2e-9 * size * (numel > 4) + added

    host = measure.host_of(all_reduce, lambda rounds, pause: 0.9e-3 if pause else 0.3e-3, 1 << 22)
    assert host.message_seconds == pytest.approx(1e-4)
    assert host.wake_seconds == pytest.approx(0.6e-3)
    assert host.byte_seconds == pytest.approx(2e-9)
    assert host.half_sum_seconds == pytest.approx(3e-9)


@pytest.mark.usefixtures("_known_machine")
def test_table_has_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "--step-seconds", "0.8").splitlines()
    assert lines[0].startswith("124,000,000 parameters, fp32, in 20 buckets; 16 workers; 1 Gb/s each way, 0.1 ms")
    for name in ("fp32 all-reduce", "fp16_compress_hook", "vote, sharded", "vote, allgather", "vote, server"):
        (line,) = (line for line in lines if line.startswith(name + "  "))
        sent, received, exchange, serial, step, ratio = (
            float(cell.replace(",", "")) for cell in line.removeprefix(name).split()
        )
        assert serial == pytest.approx(0.8 + exchange, abs=2e-4)
        assert max(0.8, exchange) - 1e-3 <= step <= serial
        if name == "fp32 all-reduce":
            assert sent == received == pytest.approx(2 * 15 / 16 * 4 * 124, abs=0.01)
            assert ratio == 1
        if name == "vote, sharded":
            assert sent == received == pytest.approx(2 * 15 / 16 / 8 * 124, abs=0.01)
    assert 'Use topology="sharded": a step is ' in lines[-1]


@pytest.mark.usefixtures("_known_machine")
def test_16_bit_gradients_have_no_fp16_line(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "--dtype", "bf16")
    assert "fp16_compress_hook" not in printed
    assert "bf16 all-reduce" in printed


@pytest.mark.usefixtures("_known_machine")
def test_fast_network_is_told_to_stay_with_ddp(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "--link", "100gbit", "--step-seconds", "3s")
    assert "Do not use signvote here: a step would be " in printed
    assert "of this step waiting for the exchange" in printed
    assert "the vote saves 20% of a step or more" in printed


@pytest.mark.parametrize("compute", [Compute(0.8), None])
def test_a_rival_that_always_wins_is_said_to(compute: Compute | None) -> None:
    # So slow a codec that even a modem's time for one parameter is less.
    codec = replace(CODEC, pack=100.0)
    cluster = Cluster([1], 4, "fp32", Link(1e9), codec, HOST, compute)
    found = advise(cluster, 2)
    assert found.break_even == {"allreduce": 0.0, "fp16": 0.0}
    assert found.worthwhile_to == 0.0
    lines = report.break_even(cluster, found).splitlines()
    vote = f"the vote ({found.topology})"
    assert lines[0] == f"fp32 all-reduce over gloo takes no longer than {vote}, at any rate of the link."
    assert lines[1] == f"fp16_compress_hook over gloo takes no longer than {vote}, at any rate of the link."
    assert lines[2:] == ([] if compute is None else ["The vote saves less than 20% of a step at any rate of the link."])


@pytest.mark.usefixtures("_known_machine")
def test_without_a_step_its_longest_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys)
    assert "Where a step computes for less than " in printed
    assert "step, exchange" not in printed


@pytest.mark.usefixtures("_known_machine")
def test_several_workers_make_a_table_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "--workers", "2", "64", "1024").splitlines()
    rows = [line.split() for line in lines if line.split() and line.split()[0] in ("2", "64", "1024")]
    assert [row[0] for row in rows] == ["2", "64", "1024"]
    assert all(len(row) == 3 + 2 + len(TOPOLOGIES) for row in rows)
    assert lines[-2].startswith("From about ")
    assert lines[-1].startswith("Beyond, every worker makes it slower")


@pytest.mark.usefixtures("_known_machine")
def test_json_has_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "plan.json"
    assert f"Written: {path}" in run(capsys, "--step-seconds", "800ms", "--json", str(path))
    document = json.loads(path.read_text())
    assert document["cluster"]["compute"]["seconds"] == 0.8
    (found,) = document["plans"]
    assert found["topology"] == "sharded"
    assert found["predictions"]["sharded"]["step_seconds"] < found["predictions"]["fp16"]["step_seconds"]


@pytest.mark.usefixtures("_known_machine")
def test_json_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main([*GPT2, "--json", str(tmp_path / "file" / "plan.json")]) == 1
    assert capsys.readouterr().err.startswith("signvote plan: ")


@pytest.mark.parametrize("workers", [2, 16, 1024])
@pytest.mark.parametrize("computing", [None, 0.0, 0.3, 30.0])
def test_advice_follows_from_the_predictions(workers: int, computing: float | None) -> None:
    compute = None if computing is None else Compute(computing)
    cluster = Cluster(ddp_buckets(10**8), 4, "fp32", Link(1e9), CODEC, HOST, compute)
    found = advise(cluster, workers)
    seconds = {method: cluster.seconds(prediction) for method, prediction in found.predictions.items()}
    assert seconds[found.topology] == min(seconds[topology] for topology in TOPOLOGIES)
    assert seconds[found.rival] == min(seconds["allreduce"], seconds["fp16"])
    assert found.saved == 1 - seconds[found.topology] / seconds[found.rival]
    if computing is not None and found.longest_step > 0:
        assert (found.saved >= WORTHWHILE) == (computing <= found.longest_step)
    if found.worthwhile_to is not None:
        assert (found.saved >= WORTHWHILE) == (cluster.link.bits_per_second <= found.worthwhile_to)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.count, "124M", 124_000_000),
        (units.count, "1.3B", 1_300_000_000),
        (units.count, "25_000_000", 25_000_000),
        (units.count, "7", 7),
        (units.count, "460k", 460_000),
        (units.rate, "1gbit", 1e9),
        (units.rate, "100mbit", 1e8),
        (units.rate, "2.5Gbit/s", 2.5e9),
        (units.rate, "1Gb/s", 1e9),
        (units.rate, "10 Gbps", 1e10),
        (units.seconds, "0.8", 0.8),
        (units.seconds, "0.8s", 0.8),
        (units.seconds, "200ms", 0.2),
        (units.seconds, "50us", 5e-5),
    ],
)
def test_units_are_understood(parse: Callable[[str], float], text: str, value: float) -> None:
    assert math.isclose(parse(text), value)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((units.count, text) for text in ("", "0", "-1M", "12X", "M", "inf", "1e30")),
        *((units.rate, text) for text in ("1", "1GB/s", "1gB/s", "fast", "0gbit", "-1gbit", "1e9gbit", "nan")),
        *((units.seconds, text) for text in ("-1", "1h", "", "inf", "ms")),
    ],
)
def test_what_is_no_quantity_is_refused(parse: Callable[[str], float], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected .*, got '"):
        parse(text)


@pytest.mark.parametrize(("number", "shown"), [(9.41e9, "9.41 Gb/s"), (1e8, "100 Mb/s"), (5e4, "50 kb/s")])
def test_rates_are_shown_short(number: float, shown: str) -> None:
    assert units.show_rate(number) == shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--params", "many"], "argument --params: expected 1 to 10T, such as 124M, 1.3B or 25_000_000, got 'many'"),
        (["--link", "1GB/s"], "argument --link: expected bits per second, "),
        (["--workers", "1"], "argument --workers: expected an integer from 2 to 65536, got '1'"),
        (["--workers", "2.5"], "argument --workers: expected an integer from 2 to 65536, got '2.5'"),
        (["--latency", "soon"], "argument --latency: expected a time of 0 to 1e6 s, "),
        (["--step-seconds", "-1"], "argument --step-seconds: expected "),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--momentum", "1"], "argument --momentum: expected a number in [0, 1), got '1'"),
        (["--bucket-mb", "none"], "argument --bucket-mb: expected a number from 0.01 to 1000000, got 'none'"),
        (["--params", "1__0M"], "argument --params: expected 1 to 10T, "),
        (
            ["--params", "10T"],
            "argument --params: 10,000,000,000,000 parameters make more than 50,000 buckets of 25 MB",
        ),
    ],
)
def test_bad_option_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*GPT2, *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("_known_machine")
@pytest.mark.parametrize(("options", "buckets"), [([], 20), (["--bucket-mb", "25"], 19), (["--bucket-mb", "100"], 5)])
def test_first_bucket_is_small_unless_a_size_is_given(
    options: list[str], buckets: int, capsys: pytest.CaptureFixture[str]
) -> None:
    # 496 MB: torch's first bucket has 1 MiB by default, and bucket_cap_mb where that is given.
    assert run(capsys, *options).startswith(f"124,000,000 parameters, fp32, in {buckets} buckets;")


def test_what_is_needed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan"])
    assert "the following arguments are required: --params, --workers, --link" in capsys.readouterr().err


def test_missing_gloo_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plan, "gloo_available", lambda: False)
    assert main(GPT2) == 1
    assert capsys.readouterr().err == "signvote plan: there is no gloo in this torch: the hook cannot run\n"


def test_gloo_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Host:
        raise RuntimeError("no address")

    monkeypatch.setattr(measure, "measure_host", fail)
    assert main(GPT2) == 1
    assert capsys.readouterr().err == "signvote plan: gloo: no address\n"
