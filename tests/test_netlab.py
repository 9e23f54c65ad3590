"""`bench/netlab.py`: what a rank sees, how fast its link is, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import labs
from labs import BENCH, ip, namespaces_of
from netlab import started

NETLAB = [sys.executable, str(BENCH / "netlab.py")]


def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run(*arguments: str, script: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A run of netlab that leaves nothing behind; ``script`` is what each rank runs, in Python."""
    command = [] if script is None else ["--", sys.executable, "-c", script]
    done = labs.run("netlab.py", *arguments, *command, seconds=60)
    assert not check or done.returncode == 0, done.stderr
    return done


def by_rank(out: str) -> dict[int, str]:
    lines = [re.fullmatch(r"(\d+): (.*)", line) for line in out.splitlines()]
    return {int(line[1]): line[2] for line in lines if line}


@pytest.mark.usefixtures("needs_lab")
def test_ranks_get_the_environment_that_torchrun_gives() -> None:
    links = ip("-o", "link")
    script = "import json, os, socket; print(json.dumps([dict(os.environ), socket.if_nameindex()]))"
    seen = {rank: json.loads(line) for rank, line in by_rank(run("--workers", "3", script=script).stdout).items()}
    assert seen.keys() == {0, 1, 2}
    for rank, (environment, interfaces) in seen.items():
        expected = {"RANK": f"{rank}", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        expected |= {"GROUP_RANK": f"{rank}", "MASTER_ADDR": "10.0.0.1", "GLOO_SOCKET_IFNAME": "eth0"}
        assert expected.items() <= environment.items()
        assert environment["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")
        assert {name for _, name in interfaces} == {"lo", "eth0"}
    assert ip("-o", "link") == links


@pytest.mark.usefixtures("needs_lab")
def test_gloo_ranks_meet() -> None:
    script = """if True:
        import datetime, torch, torch.distributed as dist
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
        x = torch.tensor([1.0 + dist.get_rank()])
        dist.all_reduce(x)
        print(x.item())
        dist.destroy_process_group()
    """
    assert by_rank(run("--workers", "2", "--rate", "1gbit", script=script).stdout) == {0: "3.0", 1: "3.0"}


STREAM = """if True:
    # Rank 1 sends BYTES to rank 0, then rank 0 to rank 1: how fast they come, and what the links have counted.
    import json, os, socket, sys, time
    sys.path.insert(0, BENCH)
    import netlab
    rank = int(os.environ["RANK"])
    if rank == 0:
        with socket.create_server(("", 5000)) as server:
            other = server.accept()[0]
    else:
        for attempt in range(100):
            try:
                other = socket.create_connection((os.environ["MASTER_ADDR"], 5000), timeout=30)
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
    other.settimeout(30)
    rates = []
    for sender in (1, 0):
        if rank == sender:
            other.sendall(bytes(BYTES))
            other.recv(1)
        else:
            left = BYTES
            begin = None
            while left:
                left -= len(other.recv(min(left, 1 << 16)))
                begin = begin or time.perf_counter()
            rates.append(8 * BYTES / (time.perf_counter() - begin))
            other.sendall(b"1")
    traffic = netlab.traffic_of(os.environ["NETLAB"], rank)
    print(json.dumps([*rates, traffic.sent, traffic.received]))
"""


@pytest.mark.usefixtures("needs_lab")
def test_links_have_their_rate_both_ways_and_count_their_bytes() -> None:
    size = 2_000_000
    script = STREAM.replace("BENCH", repr(str(BENCH))).replace("BYTES", str(size))
    seen = by_rank(run("--workers", "2", "--rate", "100mbit", script=script).stdout)
    assert seen.keys() == {0, 1}
    for line in seen.values():
        rate, sent, received = json.loads(line)
        # 0.956 is what the headers leave; a burst at the start adds about a hundredth. A busy machine is slower.
        assert 0.2e8 < rate < 1.2e8
        assert size * 1.04 < sent < size * 1.10
        assert size * 1.04 < received < size * 1.10


@pytest.mark.usefixtures("needs_lab")
def test_unlimited_links_count_too() -> None:
    script = STREAM.replace("BENCH", repr(str(BENCH))).replace("BYTES", "20000000")
    for line in by_rank(run("--workers", "2", script=script).stdout).values():
        rate, sent, _ = json.loads(line)
        assert rate > 1.2e8
        assert sent > 20_000_000


@pytest.mark.usefixtures("needs_lab")
def test_the_first_failure_ends_all_and_its_status_is_passed_on() -> None:
    script = "import os, sys, time; print(1); sys.exit('no!' if os.environ['RANK'] == '1' else time.sleep(60))"
    begin = time.monotonic()
    done = run("--workers", "3", script=script, check=False)
    assert done.returncode == 1
    assert "1: no!" in done.stderr
    assert time.monotonic() - begin < 30
    script = "import os, time; os.kill(os.getpid(), 9) if os.environ['RANK'] == '0' else time.sleep(60)"
    assert run("--workers", "2", script=script, check=False).returncode == 128 + 9


@pytest.mark.usefixtures("needs_lab")
def test_timeout_ends_all() -> None:
    done = run("--workers", "2", "--timeout", "0.5", script="import time; time.sleep(60)", check=False)
    assert done.returncode == 124
    assert "not done after 0.5 seconds" in done.stderr


@contextmanager
def sleeping(obstinate: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A lab whose ranks sleep, one of them with a child; where it is ``obstinate``, it ignores SIGTERM."""
    script = """if True:
        import os, signal, subprocess, sys, time
        if os.environ["RANK"] == "1":
            if OBSTINATE:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            subprocess.Popen(["sleep", "120"])
        print("ready", flush=True)
        time.sleep(120)
    """
    command = [*NETLAB, "--workers", "2", "--", sys.executable, "-c", script.replace("OBSTINATE", str(obstinate))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert sorted(process.stdout.readline() for _ in range(2)) == ["0: ready\n", "1: ready\n"]
        try:
            yield process
        finally:
            process.terminate()


def running_in(namespaces: list[str]) -> list[str]:
    return [pid for namespace in namespaces for pid in ip("netns", "pids", namespace).split()]


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("needs_lab", "default_sigint")
@pytest.mark.parametrize(
    ("number", "status", "obstinate"),
    [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, False), (signal.SIGHUP, 129, False)],
)
def test_signals_leave_nothing(number: signal.Signals, status: int, obstinate: bool) -> None:
    with sleeping(obstinate) as process:
        pids = running_in(namespaces_of(process.pid))
        assert len(pids) == 3
        process.send_signal(number)
        assert process.wait(30) == status
        assert not namespaces_of(process.pid)
        eventually(lambda: not any(map(alive, pids)))


@pytest.mark.usefixtures("needs_lab")
def test_what_a_killed_run_left_goes_with_the_next() -> None:
    with sleeping(obstinate=True) as process:
        run("--workers", "1", script="pass")
        left = namespaces_of(process.pid)
        assert len(left) == 3  # not touched by a run beside it
        pids = running_in(left)
        process.kill()
        process.wait(30)
        assert namespaces_of(process.pid) == left
        run("--workers", "1", script="pass")
        assert not namespaces_of(process.pid)
        eventually(lambda: not any(map(alive, pids)))


@pytest.mark.usefixtures("needs_lab")
def test_what_was_left_goes_also_if_another_process_has_its_number() -> None:
    own, other = f"netlab-{os.getpid()}-{started(os.getpid())}-9-0", f"netlab-{os.getpid()}-1-9-0"
    try:
        for name in (own, other):
            ip("netns", "add", name)
        run("--workers", "1", script="pass")
        assert namespaces_of(os.getpid()) == [own]
    finally:
        for name in namespaces_of(os.getpid()):
            ip("netns", "delete", name)


@pytest.mark.usefixtures("needs_lab")
def test_a_namespace_that_cannot_be_removed_keeps_no_other() -> None:
    script = """if True:
        import os, netlab
        remove = netlab.remove
        def refuse(namespace):
            if namespace.endswith("-0"):
                raise netlab.NetlabError(f"{namespace} stays")
            remove(namespace)
        netlab.remove = refuse
        try:
            with netlab.Lab(3) as lab:
                before = netlab.namespaces(lab.name)
        except netlab.NetlabError as error:
            print(len(before), str(error) == f"{lab.name}-0 stays", netlab.namespaces(lab.name) == [f"{lab.name}-0"])
        remove(f"{lab.name}-0")
    """
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=BENCH, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "4 True True\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "argument --workers: expected 1 to 250, got 0"),
        (["--workers", "2", "--rate", "fast"], "argument --rate: expected none, or 100kbit to 100gbit"),
        (["--workers", "2", "--rate", "1kbit"], "got '1kbit'"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    done = run(*arguments, script="pass", check=False)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("os.geteuid = lambda: 1000", "netlab: needs Linux and root"),
        ("os.geteuid = lambda: 0; os.environ['PATH'] = ''", "netlab: needs iproute2: no `ip` in PATH"),
    ],
)
def test_what_is_missing_is_named(missing: str, message: str) -> None:
    script = f"import os, sys, netlab; {missing}; sys.exit(netlab.main(['--workers', '1', 'true']))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=BENCH, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(message)
