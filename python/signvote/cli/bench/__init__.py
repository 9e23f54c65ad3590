"""`signvote bench`: how fast the ops are on this machine, and how fast they could be."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import signvote
from signvote.cli.bench import report, results
from signvote.cli.bench.bars import CUDA_MEGABYTES, CUDA_ROWS, Bar, judge, judge_cuda
from signvote.cli.bench.cases import DTYPES, OPS, ROWS, TERNARY_ROWS, Case, Data, Options, contenders, hook_bytes
from signvote.cli.bench.expected import WrongResultError
from signvote.cli.bench.machine import cuda_device, load, machine, pages, usable_cpus, versions
from signvote.cli.bench.measure import no_garbage_collection, take_turns
from signvote.cli.bench.results import Result
from signvote.cuda import BUILD_COMMAND, find_module

SIZES = (1, 26, 256)  # MB of float32, or as many coordinates of another dtype
BIG_SIZES = (26, 256)  # those with a bar
MORE_SIZES = (0.1, 4, 64)  # float32 only, for the plot
CUDA_SIZES = (26, 256, CUDA_MEGABYTES)
HOOK_COORDINATES = 6_553_600  # of 25 MiB, which DDP makes a bucket of
THREADS_SIZE = 4  # a million coordinates, from where on a second thread has its bar
SECONDS = 0.3  # for each case, unless the fewest rounds take longer
QUICK_SECONDS = 0.15
QUICK_TERNARY_ROWS = (3, 8)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure the ops on this machine, against the limits of its memory, numpy and torch",
        description="Check the results of every op, time them in turns with plain loops over the same memory (the "
        "limits), numpy and torch, print a table and the bars, and write bench.json, bandwidth.png and votes.png.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="only what the bars need, in less than 45 seconds; no files unless asked")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the ops are measured [cpu]")
    add("--op", nargs="+", choices=OPS, metavar="OP", help=f"only these of {', '.join(OPS)}")
    add("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE", help=f"only these of {', '.join(DTYPES)}")
    add("--rows", nargs="+", type=positive, metavar="M", help="numbers of workers in a vote, instead of all the usual")
    add("--size", nargs="+", type=megabytes, metavar="MB", help="MB of float32, or as many coordinates of others")
    add("--threads", nargs="+", type=positive, metavar="N", help="threads [1, 2 and all CPUs]")
    add("--implementation", nargs="+", choices=signvote.implementations(), metavar="NAME", help="only these")
    add("--json", type=Path, metavar="PATH", help="write the results there")
    add("--out", type=Path, metavar="DIR", help="folder for bench.json and the plots [signvote-bench]")
    add("--compare", type=Path, metavar="OLD.json", help="show what changed since that run")
    parser.set_defaults(run=run, fail=parser.error)


def positive(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"expected 1 to 65535, got {number}")
    return number


def megabytes(text: str) -> float:
    number = float(text)
    if not 0 < number <= 100_000:
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 100000, got {text}")
    return number


def run(options: argparse.Namespace) -> int:
    device = None if options.device == "cpu" else cuda_to_measure(options)
    old = None
    if options.compare is not None:
        try:
            old = results.read(options.compare)
        except (OSError, ValueError) as error:
            options.fail(f"argument --compare: {error}")
        else:
            before, now = old[0]["machine"]["pages"], pages()
            if before != now:
                options.fail(
                    f"argument --compare: {options.compare}: expected a run in {now}, as this one, got {before}: "
                    "they change what the ops reach of the limits"
                )
            if old[0].get("device", "cpu") != options.device:
                options.fail(f"argument --compare: {options.compare}: expected a run with --device {options.device}")
    out = options.out or (None if options.quick else Path("signvote-bench"))
    if out is not None and device is None and find_spec("matplotlib") is None:
        print("signvote bench: no plots without matplotlib: pip install 'signvote[bench]'", file=sys.stderr)
    cases = chosen_cases(options)
    if not cases:
        options.fail("these options leave nothing to measure")
    facts = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": options.device,
        "machine": machine() | ({} if device is None else {"cuda": cuda_device(device)}),
        "versions": versions(),
        "load_before": load(),
    }
    print_facts(facts)
    begin = time.perf_counter()
    try:
        measured = measure_all(cases, options)
    except WrongResultError as error:
        print(f"signvote bench: wrong result: {error}", file=sys.stderr)
        return 1
    facts["seconds"] = round(time.perf_counter() - begin, 1)
    best = (options.implementation or signvote.implementations())[0]
    lines = judge(measured, best) if device is None else judge_cuda(measured)
    print_report(options, measured, lines)
    print(f"\n{len(measured)} results, all checked before they were timed, in {facts['seconds']:.0f} s.")
    try:
        write_files(out, options.json, facts, measured, lines)
    except OSError as error:
        print(f"signvote bench: {error}", file=sys.stderr)
        return 1
    if old is not None:
        print_comparison(old, facts, measured)
    return 0


def cuda_to_measure(options: argparse.Namespace) -> torch.device:
    """The current CUDA device, if ops can be measured there and nothing was asked for that only a CPU has."""
    for name in ("threads", "implementation"):
        if getattr(options, name) is not None:
            options.fail(f"argument --{name}: expected none with --device cuda: it is the CPU's")
    if find_module() is None:
        options.fail(
            f"argument --device: cuda: signvote was built without its CUDA part; in a checkout, with nvcc in PATH: "
            f"{BUILD_COMMAND}"
        )
    if not torch.cuda.is_available():
        options.fail("argument --device: cuda: torch finds no CUDA device (torch.cuda.is_available())")
    return torch.device("cuda", torch.cuda.current_device())


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """In an order in which cases on the same data follow each other."""
    return cuda_cases(options) if options.device == "cuda" else cpu_cases(options)


def cuda_cases(options: argparse.Namespace) -> list[Case]:
    cases: list[Case] = []
    for size in options.size or ((CUDA_MEGABYTES,) if options.quick else CUDA_SIZES):
        for dtype in DTYPES:
            cases += [Case(op, size, dtype) for op in ("pack_signs", "pack_momentum", "unpack_signs")]
            if dtype == "float32":
                cases.append(Case("round_trip", size))
            cases.append(Case("pack_signs", size, dtype, zeros="third"))
            cases += [Case(op, size, dtype) for op in ("pack_ternary", "unpack_ternary")]
        for op in ("majority_vote_ternary", "majority_vote"):
            cases += [Case(op, size, rows=rows) for rows in sorted(options.rows or CUDA_ROWS, reverse=True)]
    return asked_for(cases, options)


def asked_for(cases: Sequence[Case], options: argparse.Namespace) -> list[Case]:
    return [
        case
        for case in cases
        if case.op in (options.op or OPS) and (case.rows is not None or case.dtype in (options.dtype or DTYPES))
    ]


def cpu_cases(options: argparse.Namespace) -> list[Case]:
    cases: list[Case] = []
    sizes = options.size or (BIG_SIZES if options.quick else SIZES)
    for size in sizes:
        for dtype in DTYPES:
            for op in ("pack_signs", "pack_momentum", "unpack_signs"):
                # The bar of the momentum is for float32.
                if not (options.quick and op == "pack_momentum" and dtype != "float32"):
                    cases.append(Case(op, size, dtype))
            # For want of time a quick run has abstention for float32 only, and for few numbers of workers.
            if not options.quick or dtype == "float32":
                cases += [Case(op, size, dtype) for op in ("pack_ternary", "unpack_ternary")]
            if dtype == "float32":
                cases.append(Case("codec", size))
            cases.append(Case("pack_signs", size, dtype, zeros="third"))
    more = () if options.size else (THREADS_SIZE,) if options.quick else MORE_SIZES
    for size in more:
        cases += [Case(op, size) for op in ("pack_signs", "pack_momentum", "unpack_signs")]
        cases.append(Case("pack_signs", size, zeros="third"))
    if THREADS_SIZE in more:
        cases.append(Case("majority_vote", THREADS_SIZE, rows=8))
    for size in sizes:
        # The most rows first: the others take some of them.
        cases += [Case("majority_vote", size, rows=rows) for rows in sorted(options.rows or ROWS, reverse=True)]
        ternary_rows = sorted(options.rows or (QUICK_TERNARY_ROWS if options.quick else TERNARY_ROWS), reverse=True)
        cases += [Case("majority_vote_ternary", size, rows=rows) for rows in ternary_rows]
    return asked_for(cases, options)


def measure_all(cases: Sequence[Case], options: argparse.Namespace) -> list[Result]:
    measured: list[Result] = []
    data = Data()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # peers have one thread, as numpy has
    try:
        with no_garbage_collection():
            for number, case in enumerate(cases, 1):
                progress(f"{number} of {len(cases)}: {case.label()}")
                measured += measure_case(case, data, options)
    finally:
        torch.set_num_threads(threads_before)
        progress("")
    # As a person looks for them; sorting keeps the order of what is equal here.
    order = {op: place for place, op in enumerate(OPS)}
    return sorted(measured, key=lambda r: (order[r.op], r.zeros, DTYPES.index(r.dtype), r.rows or 0, r.megabytes))


def measure_case(case: Case, data: Data, options: argparse.Namespace) -> list[Result]:
    field, size = contenders(case, data, who(case, options))
    for contender in field:
        if contender.check is not None:
            contender.check()
    take_turns(field, QUICK_SECONDS if options.quick else SECONDS)
    return results.results_of(case, field, size)


def who(case: Case, options: argparse.Namespace) -> Options:
    if options.device == "cuda":
        return Options([("cuda", 1)], device=cuda_to_measure(options))
    implementations = options.implementation or signvote.implementations()
    threads = options.threads or sorted({1, min(2, usable_cpus()), usable_cpus()})
    if not options.quick:
        return Options([(name, number) for name in implementations for number in threads])
    # Above 26 MB a second thread is shown for a few only, for the sake of time.
    several = case.megabytes <= 26 or (case.dtype == "float32" and case.rows in (None, 8))
    pairs = [(implementations[0], number) for number in threads if number <= (2 if several else 1)]
    if case.megabytes == 26:  # where AVX2 has its bar, and numpy
        pairs += [(name, 1) for name in implementations[1:] if name == "avx2"]
    return Options(pairs, with_peers=case.megabytes == 26 and case.dtype == "float32" and case.rows in (None, 3, 8))


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def print_facts(facts: dict[str, Any]) -> None:
    about, found = facts["machine"], facts["versions"]
    memory = f"{about['memory_gigabytes']} GB in {about['pages']}"
    print(f"{about['cpu']}, {about['cpus']} CPUs, {memory}, {', '.join(about['caches'])}")
    print(", ".join(f"{name} {version}" for name, version in found.items()))
    if "cuda" in about:
        print(", ".join(f"{name} {value}" for name, value in about["cuda"].items()))
        share = hook_bytes(HOOK_COORDINATES) / (4 * HOOK_COORDINATES)
        print(f"The hook copies {share:.4f} of a bucket's float32 bytes to the host, and as many back.")
    busy = facts["load_before"]
    if busy is not None and busy > 0.5:
        print(f"Other programs are running: the load of the last minute is {busy:.1f}. Ratios will spread.")
    print()


def print_report(options: argparse.Namespace, measured: Sequence[Result], lines: Sequence[Bar]) -> None:
    if not options.quick:
        print(report.table(measured))
    if lines:
        print(f"\nThe bars\n{report.bars_table(lines)}\n\n{report.summary(lines)}")


def write_files(
    out: Path | None, json_path: Path | None, facts: dict[str, Any], measured: Sequence[Result], lines: Sequence[Bar]
) -> None:
    written = []
    facts["load_after"] = load()
    for path in (json_path, out and out / "bench.json"):
        if path is not None:
            results.write(path, facts, measured, lines)
            written.append(path)
    if out is not None and facts["device"] == "cpu" and find_spec("matplotlib") is not None:
        from signvote.cli.bench import plots  # it imports the extra

        written += plots.write(out, measured, facts["machine"]["cpu"])
    if written:
        print(f"Written: {', '.join(map(str, written))}")


def print_comparison(old: tuple[dict[str, Any], list[Result]], facts: dict[str, Any], measured: list[Result]) -> None:
    before, old_results = old
    print(f"\nCompared with the run of {before['when']}")
    for name in ("machine", "versions"):
        differing = [key for key in facts[name] if before[name].get(key) != facts[name][key]]
        for key in differing:
            print(f"  {key}: {before[name].get(key)} before, {facts[name][key]} now")
    print(report.compare(old_results, measured))
