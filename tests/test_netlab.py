"""`bench/netlab.py`: what a rank sees, how fast its link is, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
NETLAB = [sys.executable, str(BENCH / "netlab.py")]


def refusal() -> str | None:
    """Why this machine cannot have a lab."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "no iproute2"
    name = f"signvote-test-{os.getpid()}"
    try:
        for command in (
            f"ip netns add {name}",
            f"ip -n {name} link add bridge type bridge",
            f"ip -n {name} link add one type veth peer name two",
            f"tc -n {name} qdisc add dev one root tbf rate 1mbit burst 25000 limit 50000",
        ):
            done = subprocess.run(command.split(), capture_output=True, text=True, timeout=30, check=False)
            if done.returncode != 0:
                return f"{command}: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30, check=False)
    return None


REFUSAL = refusal()
needs_lab = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=True).stdout


def namespaces_of(pid: int) -> list[str]:
    return re.findall(rf"^netlab-{pid}-\S+", ip("netns", "list"), re.MULTILINE)


def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run(*arguments: str, script: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A run of netlab that leaves nothing behind; ``script`` is what each rank runs, in Python."""
    command = [] if script is None else ["--", sys.executable, "-c", script]
    with subprocess.Popen(
        [*NETLAB, *arguments, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    assert not (REFUSAL is None and namespaces_of(process.pid))
    assert not check or process.returncode == 0, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def by_rank(out: str) -> dict[int, str]:
    lines = [re.fullmatch(r"(\d+): (.*)", line) for line in out.splitlines()]
    return {int(line[1]): line[2] for line in lines if line}


@needs_lab
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


@needs_lab
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


@needs_lab
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


@needs_lab
def test_unlimited_links_count_too() -> None:
    script = STREAM.replace("BENCH", repr(str(BENCH))).replace("BYTES", "20000000")
    for line in by_rank(run("--workers", "2", script=script).stdout).values():
        rate, sent, _ = json.loads(line)
        assert rate > 1.2e8
        assert sent > 20_000_000


@needs_lab
def test_the_first_failure_ends_all_and_its_status_is_passed_on() -> None:
    script = "import os, sys, time; print(1); sys.exit('no!' if os.environ['RANK'] == '1' else time.sleep(60))"
    begin = time.monotonic()
    done = run("--workers", "3", script=script, check=False)
    assert done.returncode == 1
    assert "1: no!" in done.stderr
    assert time.monotonic() - begin < 30
    script = "import os, time; os.kill(os.getpid(), 9) if os.environ['RANK'] == '0' else time.sleep(60)"
    assert run("--workers", "2", script=script, check=False).returncode == 128 + 9


@needs_lab
def test_timeout_ends_all() -> None:
    done = run("--workers", "2", "--timeout", "0.5", script="import time; time.sleep(60)", check=False)
    assert done.returncode == 124
    assert "not done after 0.5 seconds" in done.stderr


@pytest.fixture
def sleeping() -> Iterator[subprocess.Popen[str]]:
    """A lab whose ranks sleep, one of them in a child that ignores SIGTERM."""
    script = """if True:
        import os, signal, subprocess, sys, time
        if os.environ["RANK"] == "1":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            subprocess.Popen(["sleep", "120"])
        print("ready", flush=True)
        time.sleep(120)
    """
    command = [*NETLAB, "--workers", "2", "--", sys.executable, "-c", script]
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


@needs_lab
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_leave_nothing(sleeping: subprocess.Popen[str], number: signal.Signals, status: int) -> None:
    pids = running_in(namespaces_of(sleeping.pid))
    assert len(pids) == 3
    sleeping.send_signal(number)
    assert sleeping.wait(30) == status
    assert not namespaces_of(sleeping.pid)
    eventually(lambda: not any(map(alive, pids)))


@needs_lab
def test_what_a_killed_run_left_goes_with_the_next(sleeping: subprocess.Popen[str]) -> None:
    run("--workers", "1", script="pass")
    left = namespaces_of(sleeping.pid)
    assert len(left) == 3  # not touched by a run beside it
    pids = running_in(left)
    sleeping.kill()
    sleeping.wait(30)
    assert namespaces_of(sleeping.pid) == left
    run("--workers", "1", script="pass")
    assert not namespaces_of(sleeping.pid)
    eventually(lambda: not any(map(alive, pids)))


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
