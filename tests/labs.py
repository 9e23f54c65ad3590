"""For tests of `bench/`: whether this machine can have a lab, and its programs, run as a user runs them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench"


@functools.cache
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


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=True).stdout


def namespaces_of(pid: int) -> list[str]:
    return re.findall(rf"^netlab-{pid}-\S+", ip("netns", "list"), re.MULTILINE)


def run(program: str, *arguments: str, seconds: float = 110.0) -> subprocess.CompletedProcess[str]:
    """A run of one of the programs in `bench/`, which must leave no namespace behind."""
    command = [sys.executable, str(BENCH / program), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    assert not (refusal() is None and namespaces_of(process.pid))
    return subprocess.CompletedProcess(command, process.returncode, out, err)
