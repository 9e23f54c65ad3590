"""The ranks of one state: a gloo group of its own, the thread that speaks on it, and what has gone over it.

torch's collectives match by order alone. If two ranks issue theirs in different orders, or share a group with someone
else's, they hang or swap data. So a state has its own group, and one thread issues every collective on it, first in
first out, in DDP's bucket order.

Where all ranks have something for all others, messages take the place of gloo's collectives: its all_to_all posts each
send before the receive on the same connection, so that the two directions of a link take turns, and its all_gather is a
ring of M - 1 rounds. Here a rank posts its receives first, and then sends to all others at once.

Between CUDA devices NCCL's collectives are used, and waited for on the host: what returns is done, as on the CPU. NCCL
makes its connections in the first of them, for which the time of the store holds, not that of the channel.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from signvote.ddp.stats import Traffic

# torch renames all_gather_into_tensor to all_gather_single and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# How often to ask whether a device has done its part. An event can be waited for too, but without a limit of time.
_POLL_SECONDS = 50e-6
# How many times as long as the channel torch's own watchdog of NCCL waits.
_PATIENCE = 3


class CollectiveError(RuntimeError):
    """A collective failed; the message starts with its name."""


class Channel:
    """Collectives on words over the ranks of ``process_group`` (default: all ranks).

    The group and the thread go when torch's groups go (``destroy_process_group()``): the channel keeps neither alive.
    The thread also goes with the channel, and both with :meth:`close`.

    Args:
        process_group: The ranks.
        timeout: How long each message, and each of gloo's collectives, may take; None: as long as ``process_group``
            gives them. One exchange is several messages.
        backend: ``"gloo"``, or ``"nccl"`` to :meth:`swap` and :meth:`share` words on CUDA devices; all else is gloo's.
        traffic: Counts the payload handed to the collectives for other ranks and taken from them, and their time.

    Attributes:
        rank, size: This rank in the group, and how many there are.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        timeout: timedelta | None,
        traffic: Traffic,
        backend: str = "gloo",
    ) -> None:
        group = _new_group(process_group, timeout, backend)
        self._group = weakref.ref(group)
        self._timeout = _limit_of(group, timeout)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._ranks = dist.get_process_group_ranks(group)
        # Beginning with the next one: not all send to the same rank first.
        self._others = [(self.rank + distance) % self.size for distance in range(1, self.size)]
        self._traffic = traffic
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="signvote")
        self._last: Future[None] | None = None
        for owner in (group, self):
            weakref.finalize(owner, self._worker.shutdown, wait=False)

    @property
    def alive(self) -> bool:
        return self._group() is not None

    def submit(self, task: Callable[[], None]) -> None:
        """Run ``task`` on the worker thread, after all that was submitted before. The task must not raise."""
        self._last = self._worker.submit(task)

    def wait_idle(self) -> None:
        """Return when all that was submitted is done."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """End the thread, and the group on this rank."""
        self._worker.shutdown()
        group = self._group()
        if group is not None:
            dist.destroy_process_group(group)

    def swap(self, name: str, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Row m of ``sent`` goes to rank m, row m of ``received`` comes from it. ``name`` is for errors."""
        self._exchange(name, received, sent, dist.all_to_all_single, received, sent)

    def share(self, name: str, received: torch.Tensor, own: torch.Tensor) -> None:
        """The one row ``own``, which may be this rank's of ``received``, goes to all; row m comes from rank m."""
        self._exchange(name, received, own.expand_as(received), _all_gather, received.view(-1), own.view(-1))

    def _exchange(
        self,
        name: str,
        received: torch.Tensor,
        sent: torch.Tensor,
        collective: Callable[..., object],
        *tensors: torch.Tensor,
    ) -> None:
        """By messages in host memory, by the ``collective`` of ``tensors`` on a CUDA device.

        gloo takes a message shorter than its row in silence. The row's end then holds an older trailer, whose tag shows
        that the ranks are out of step.
        """
        tag = 0  # messages between two ranks arrive in the order in which they were sent

        def in_host_memory(group: dist.ProcessGroup) -> None:
            arriving = [group.recv([received[rank]], rank, tag) for rank in self._others]
            leaving = [group.send([sent[rank]], rank, tag) for rank in self._others]
            received[self.rank] = sent[self.rank]
            for work in arriving + leaving:
                _wait(work)

        def on_device(group: dist.ProcessGroup) -> None:
            collective(*tensors, group=group)
            if not self._is_done_on_device():
                _abort(group)
                raise RuntimeError(f"not done on {received.device} after {self._timeout}")

        others = sent.nbytes // self.size * (self.size - 1)
        self._run(name, on_device if sent.is_cuda else in_host_memory, to_others=others, from_others=others)

    def _is_done_on_device(self) -> bool:
        """Return when the current stream has done what was begun on it, or when the timeout is over."""
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream())
        deadline = time.monotonic() + self._timeout.total_seconds()
        while not done.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def all_gather(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Row m of ``received`` is what rank m sent."""
        others = sent.nbytes * (self.size - 1)
        self._run("all_gather", _all_gather, received.view(-1), sent.view(-1), to_others=others, from_others=others)

    def send_to_first(self, sent: torch.Tensor) -> None:
        """``sent`` goes to rank 0, which calls :meth:`receive_in_turn`."""
        self._run(
            "gather",
            lambda group: _wait(group.send([sent.view(-1)], 0, 0)),  # rank 0, tag 0
            to_others=sent.nbytes,
            from_others=0,
        )

    def receive_in_turn(self, own: torch.Tensor, received: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """On rank 0: each rank and its message, in the order of the ranks, beginning with ``own``.

        A message stays in its row of ``received``, which has two, until the next one is asked for, and arrives while
        the caller is busy with the one before.
        """
        arriving = self._begin_to_receive(1, received)
        yield 0, own.view(-1)
        for rank in range(1, self.size):
            self._run("gather", lambda group, work=arriving: _wait(work), to_others=0, from_others=own.nbytes)
            arriving = self._begin_to_receive(rank + 1, received)
            yield rank, received[rank % 2]

    def _begin_to_receive(self, rank: int, received: torch.Tensor) -> dist.Work | None:
        if rank == self.size:
            return None
        work: list[dist.Work | None] = []
        self._run(
            "gather",
            lambda group: work.append(dist.irecv(received[rank % 2], src=self._ranks[rank], group=group)),
            to_others=0,
            from_others=0,
        )
        return work[0]

    def broadcast(self, words: torch.Tensor) -> None:
        """``words`` of rank 0 to all."""
        self._run(
            "broadcast",
            dist.broadcast,
            words,
            to_others=words.nbytes * len(tree_children(self.rank, self.size)),
            from_others=0 if self.rank == 0 else words.nbytes,
            src=self._ranks[0],
        )

    def _run(
        self,
        name: str,
        collective: Callable[..., object],
        *tensors: object,
        to_others: int,
        from_others: int,
        **options: int,
    ) -> None:
        group = self._group()
        if group is None:
            raise CollectiveError(f"{name}: the process group was destroyed")
        start = time.perf_counter()
        try:
            collective(*tensors, group=group, **options)
        except Exception as error:
            raise CollectiveError(f"{name}: {error}") from error
        self._traffic.seconds += time.perf_counter() - start
        self._traffic.bytes_sent += to_others
        self._traffic.bytes_received += from_others


def _wait(work: dist.Work) -> None:
    """Return when ``work`` is done. If it was aborted, gloo's wait() does not raise, but returns False."""
    if not work.wait():
        raise RuntimeError("a message was aborted")


def tree_children(rank: int, size: int) -> list[int]:
    """The ranks to which this one passes on what rank 0 broadcasts.

    gloo's broadcast is a binomial tree: rank r sends to each r + 2^j < size with 2^j above all bits of r.
    """
    bits = range(rank.bit_length(), (size - 1).bit_length())
    return [rank + 2**bit for bit in bits if rank + 2**bit < size]


def _abort(group: dist.ProcessGroup) -> None:
    """Have NCCL give up: its kernels would keep the stream, and write to messages whose memory is used again."""
    with suppress(Exception):  # of torch before 2.8, or of a communicator that is gone
        group._get_backend(torch.device("cuda")).abort()


def _new_group(parent: dist.ProcessGroup | None, timeout: timedelta | None, backend: str) -> dist.ProcessGroup:
    """A new group over the ranks of ``parent``; all of them call this.

    It always speaks gloo on the CPU: there the ranks find out if they want different backends.
    """
    if backend == "gloo":
        return _new_group_of(parent, timeout or _timeout_of(parent), "gloo")
    if not dist.is_nccl_available():
        raise RuntimeError("backend: expected 'gloo', as this torch is built without NCCL, got 'nccl'")
    with _connecting_later():
        group = _new_group_of(parent, timeout or _timeout_of(parent), f"cpu:gloo,cuda:{backend}")
    patience = _PATIENCE * _limit_of(group, timeout)
    with suppress(Exception):  # torch ends the process when its own time is over: after the channel has said why
        group._get_backend(torch.device("cuda"))._set_default_timeout(patience)
    return group


@contextmanager
def _connecting_later() -> Iterator[None]:
    """Have NCCL connect a new group's ranks when they first need it.

    Where the default group is bound to a device, torch would connect them at once, with the help of all other ranks.
    """
    default = dist.distributed_c10d._get_default_group()
    device = getattr(default, "bound_device_id", None)
    if device is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = device


def _new_group_of(parent: dist.ProcessGroup | None, timeout: timedelta | None, backend: str) -> dist.ProcessGroup:
    if parent is None or parent is dist.group.WORLD:
        # Every rank of the job is here, so torch can name the group by a number that is the same on all of them.
        return dist.new_group(timeout=timeout, backend=backend)
    # Only members are here. torch then names the group by how many groups this rank is in: where members differ, they
    # would wait for each other under two names until the timeout.
    store = dist.distributed_c10d._get_process_group_store(parent)
    rank, ranks = dist.get_rank(parent), dist.get_process_group_ranks(parent)
    attempt = store.add(f"signvote/attempts/{rank}", 1)
    store.set(f"signvote/{attempt}/{rank}", str(len(dist.distributed_c10d._world.pg_names)))
    counts = [int(store.get(f"signvote/{attempt}/{other}")) for other in range(len(ranks))]
    if len(set(counts)) > 1:
        raise RuntimeError(
            f"ranks {ranks} belong to {counts} process groups, and torch makes no group among ranks that belong to "
            "different numbers of them: make the other groups after the first backward pass"
        )
    return dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True)


def _limit_of(group: dist.ProcessGroup, timeout: timedelta | None) -> timedelta:
    """How long ``group`` waits, that was made with ``timeout``."""
    return timeout or _timeout_of(group) or dist.constants.default_pg_timeout


def _timeout_of(group: dist.ProcessGroup | None) -> timedelta | None:
    """The timeout the user gave ``group``, where torch tells; None means torch's default."""
    group = group or dist.group.WORLD
    for device in ("cpu", "cuda"):
        with suppress(Exception):
            assert group is not None
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
            return timeout
    return None
