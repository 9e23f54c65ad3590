"""Several hosts on one machine: run a command as one rank on each, over links of a given rate.

    python bench/netlab.py --workers 4 --rate 1gbit -- python train.py

Each worker is a network namespace with a veth pair to a bridge, and the bridge has a namespace of its own: nothing of
the host's network is touched, and worker k sees only ``lo`` and ``eth0`` (10.0.0.k+1). The link is limited both ways by
token buckets (``tc tbf``): on the worker's end for what it sends, on the bridge's end for what it receives. So a worker
to which several send at once has one link's rate for all of them, as behind a switch. Needs Linux, root and iproute2.

Links have no delay but that of their queues: this needs ``netem``, which many kernels are built without. Where a figure
for another delay is wanted, add it by arithmetic: the collectives of a step, each with as many messages one after the
other as it takes, times the delay.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

MAX_WORKERS = 250
INTERFACE = "eth0"
NETWORK = "10.0.0.0/24"
BRIDGE = "bridge"
PORT = 29500  # of rank 0's rendezvous; the namespace is new, so it is free

# After a pause a link lets BURST_SECONDS of its rate pass at once, and at least a packet of GSO_BYTES. A smaller burst
# loses rate: the kernel wakes up too late to use every token. TCP hands over packets of up to 64 KB, which a network
# card would cut into frames; a burst that holds one of those would hide a rate of 100 Mb/s from short messages.
BURST_SECONDS = 1e-3
GSO_BYTES = 16384
# What may wait for tokens, as in the packet buffer of a small switch. What does not fit is lost, and TCP slows down.
QUEUE_BYTES = 512 * 1024

UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
GRACE_SECONDS = 3.0  # from SIGTERM to SIGKILL
TOOL_SECONDS = 30.0  # for ip and tc


class NetlabError(RuntimeError):
    """The lab could not be set up; the message says what is missing."""


@dataclass(frozen=True)
class Traffic:
    """Bytes on a worker's link: whole frames, each with its headers, acknowledgements and retransmissions included."""

    sent: int
    received: int


def parse_rate(text: str) -> float | None:
    """Bits per second; None for ``none``."""
    if text == "none":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?bit)", text)
    if match is None or not 1e5 <= (rate := float(match[1]) * UNITS[match[2]]) <= 1e11:
        raise ValueError(f"rate: expected none, or 100kbit to 100gbit such as 100mbit or 1gbit, got {text!r}")
    return rate


def burst_bytes(bits_per_second: float) -> float:
    """What a link of this rate lets pass at once after a pause."""
    return max(bits_per_second / 8 * BURST_SECONDS, 1.5 * GSO_BYTES)


class Lab:
    """Hosts for ``workers`` ranks, as a context; on its end, also by SIGTERM or Ctrl-C, everything is given back.

    To be used in the main thread. What an earlier process that was killed has left behind is removed first.

    Args:
        workers: How many hosts.
        rate: Of each link in each direction: a number with ``kbit``, ``mbit`` or ``gbit``, or ``none``: no limit.

    Raises:
        NetlabError: Without root or iproute2, or where the kernel refuses namespaces, bridges or ``tbf``.
    """

    _numbers = itertools.count()

    def __init__(self, workers: int, rate: str = "none") -> None:
        if not 1 <= workers <= MAX_WORKERS:
            raise ValueError(f"workers: expected 1 to {MAX_WORKERS}, got {workers}")
        self.workers = workers
        self.bits_per_second = parse_rate(rate)
        self.name = f"netlab-{os.getpid()}-{started(os.getpid())}-{next(self._numbers)}"
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Lab:
        check_requirements()
        remove_stale()
        self._cleanup.enter_context(_signals_raise())
        try:
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._cleanup, _signals_wait():
            failures = []
            for namespace in namespaces(self.name):
                try:
                    remove(namespace)
                except NetlabError as failure:  # the others go all the same
                    failures.append(failure)
            if failures:
                raise failures[0]

    def _build(self) -> None:
        switch = switch_of(self.name)
        _tool("ip", "netns", "add", switch)
        _tool("ip", "-n", switch, "link", "add", BRIDGE, "type", "bridge", "mcast_snooping", "0")
        _tool("ip", "-n", switch, "link", "set", BRIDGE, "addrgenmode", "none", "up")
        for rank in range(self.workers):
            worker, port = worker_of(self.name, rank), port_of(rank)
            _tool("ip", "netns", "add", worker)
            _tool("ip", "-n", worker, "link", "set", "lo", "up")
            _tool("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", worker)
            for namespace, device in ((switch, port), (worker, INTERFACE)):
                # No IPv6 addresses: their announcements would be counted.
                options = ("addrgenmode", "none", "gso_max_size", f"{GSO_BYTES}")
                _tool("ip", "-n", namespace, "link", "set", device, *options)
                _tool("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *self._queue())
                _tool("ip", "-n", namespace, "link", "set", device, "up")
            _tool("ip", "-n", switch, "link", "set", port, "master", BRIDGE)
            _tool("ip", "-n", worker, "address", "add", f"{address_of(rank)}/24", "dev", INTERFACE, "noprefixroute")
            # Linux's default congestion control, also on a machine that has another.
            _tool("ip", "-n", worker, "route", "add", NETWORK, "dev", INTERFACE, "congctl", "cubic")

    def _queue(self) -> list[str]:
        """The queue at each end of a link, which also counts its bytes."""
        if self.bits_per_second is None:
            return ["pfifo"]
        burst = f"{burst_bytes(self.bits_per_second):.0f}"
        return ["tbf", "rate", f"{self.bits_per_second:.0f}bit", "burst", burst, "limit", f"{QUEUE_BYTES}"]

    def run(self, command: Sequence[str], *, timeout: float, environment: Mapping[str, str] | None = None) -> int:
        """Run ``command`` as one rank on each host, with the environment that torchrun would give it.

        Its output goes to this process's, each line behind the rank. When one fails, the others are ended.

        Args:
            timeout: Seconds after which all are ended.
            environment: Variables to set besides.

        Returns:
            0, or the exit status of the first that failed (128 and the signal that ended it).

        Raises:
            TimeoutError: If they took longer than ``timeout``.
        """
        deadline = time.monotonic() + timeout
        ended: queue.Queue[int] = queue.Queue()
        processes = []
        threads = []
        try:
            for rank in range(self.workers):
                process = subprocess.Popen(
                    ["ip", "netns", "exec", worker_of(self.name, rank), *command],
                    env={**os.environ, **self._environment(rank), **(environment or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C in a terminal is for netlab, which ends them
                )
                processes.append(process)
                threads.append(threading.Thread(target=lambda p=process: ended.put(p.wait()), daemon=True))
                for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                    threads.append(threading.Thread(target=_pass_on, args=(f"{rank}: ", source, target), daemon=True))
            with _signals_wait():  # so that none of these threads takes a signal
                for thread in threads:
                    thread.start()
            for _ in processes:
                try:
                    status = ended.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    raise TimeoutError(f"{command[0]}: not done after {timeout:g} seconds") from None
                if status != 0:
                    return 128 - status if status < 0 else status
            return 0
        finally:
            with _signals_wait():
                self._end(processes)
                for thread in threads:
                    if thread.ident is not None:
                        thread.join(GRACE_SECONDS)

    def _end(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """End what still runs on the hosts, first asking."""
        deadline = time.monotonic() + GRACE_SECONDS
        for rank in range(self.workers):
            signal_all(worker_of(self.name, rank), signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(0.0, deadline - time.monotonic()))
        for rank in range(self.workers):
            signal_all(worker_of(self.name, rank), signal.SIGKILL)
        for process in processes:
            process.kill()  # one that was not on its host yet
            process.wait(GRACE_SECONDS)

    def _environment(self, rank: int) -> dict[str, str]:
        number = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": PORT}
        number |= dict.fromkeys(("RANK", "GROUP_RANK", "ROLE_RANK"), rank)
        number |= dict.fromkeys(("WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"), self.workers)
        number |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
        return {
            **{name: str(value) for name, value in number.items()},
            "MASTER_ADDR": address_of(0),
            "ROLE_NAME": "default",
            "TORCHELASTIC_RUN_ID": self.name,
            # torchrun sets it too where it starts more than one process on a machine.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NETLAB": self.name,
        }

    def traffic(self) -> list[Traffic]:
        """What has gone over each worker's link so far."""
        return [traffic_of(self.name, rank) for rank in range(self.workers)]


def traffic_of(lab: str, rank: int) -> Traffic:
    """What has gone over the link of a rank, also for the rank itself: its lab's name is in the variable NETLAB."""
    return Traffic(sent=_counted(worker_of(lab, rank), INTERFACE), received=_counted(switch_of(lab), port_of(rank)))


def _counted(namespace: str, device: str) -> int:
    """Bytes that have left the queue. The device's own count has one header for each packet, not for each frame."""
    (found,) = json.loads(_tool("tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", device, "root"))
    return int(found["bytes"])


def worker_of(lab: str, rank: int) -> str:
    return f"{lab}-{rank}"


def switch_of(lab: str) -> str:
    return f"{lab}-switch"


def port_of(rank: int) -> str:
    return f"port{rank}"


def address_of(rank: int) -> str:
    return f"10.0.0.{rank + 1}"


def check_requirements() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NetlabError("needs Linux and root: network namespaces are made with `ip netns`")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NetlabError(f"needs iproute2: no `{tool}` in PATH (on Debian: apt-get install iproute2)")


def namespaces(prefix: str) -> list[str]:
    found = (line.split()[0] for line in _tool("ip", "netns", "list").splitlines() if line)
    return [name for name in found if name.startswith(f"{prefix}-")]


def started(pid: int) -> int | None:
    """When that process began, in clock ticks since the machine did: another one with its number began later."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # the name before may hold anything


def remove_stale() -> None:
    """Remove the labs of processes that are gone."""
    for namespace in namespaces("netlab"):
        match = re.fullmatch(r"netlab-(\d+)-(\d+)-\d+-(?:\d+|switch)", namespace)
        if match and started(int(match[1])) != int(match[2]):
            with contextlib.suppress(NetlabError):  # another run that begins now may have been first
                remove(namespace)


def remove(namespace: str) -> None:
    """Its links go with it, after the last of its processes."""
    signal_all(namespace, signal.SIGKILL)
    _tool("ip", "netns", "delete", namespace)


def signal_all(namespace: str, number: signal.Signals) -> None:
    for pid in _tool("ip", "netns", "pids", namespace).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), number)


def _tool(*command: str) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise NetlabError(f"`{' '.join(command)}`: not done after {TOOL_SECONDS} s") from None
    if done.returncode != 0:
        raise NetlabError(f"`{' '.join(command)}`: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


def _pass_on(prefix: str, source: IO[bytes], target: IO[str]) -> None:
    with source:
        for line in source:
            target.write(prefix + line.decode(errors="replace"))
            target.flush()


ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program as an exception does, so that what is open is closed."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """What would end the program waits until the end of this context."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *ENDING})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workers", type=int, required=True, metavar="M", help="how many hosts, one rank on each")
    add("--rate", default="none", help="of each link, both ways: such as 100mbit or 1gbit, or none: no limit [none]")
    add("--timeout", type=float, default=3600.0, metavar="S", help="seconds after which all is ended [3600]")
    add("command", nargs="+", metavar="COMMAND", help="what each rank runs, after --")
    options = parser.parse_args(argv)
    try:
        lab = Lab(options.workers, options.rate)
    except ValueError as error:
        parser.error(f"argument --{error}")
    try:
        with lab:
            return lab.run(options.command, timeout=options.timeout)
    except NetlabError as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 1
    except TimeoutError as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 124
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
