"""What one step costs: bytes, messages and seconds of each way to exchange gradients over links of a given rate.

Arithmetic only. Every exchange is a sequence of phases of equal messages, as gloo sends them in torch 2.13 (files of
pytorch/gloo):

- all-reduce, ``gloo/allreduce.cc``: a ring, 2·(M - 1) rounds, the first half of which also adds. In each round a worker
  passes on 1/M of the bucket, cut into at least two segments of at most 1 MiB, of which two are in flight.
- swap, signvote/ddp/channel.py: what "sharded" (twice) and "allgather" (once) are made of. M - 1 messages, of which all
  are asked for at once and then sent at once, both directions of a link at the same time.
- broadcast, ``gloo/broadcast.cc``: a binomial tree, in which a worker begins to send to all its children at once.
- A message begins when its receiver has asked for it (``gloo/transport/tcp/pair.cc``).

A message takes the link's time or the host's, whichever is longer, because gloo works on one while the next is under
way; a round also takes the link's latency. The cost of computing is added: see :class:`Codec`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from signvote.ddp.channel import tree_children
from signvote.ddp.layout import TRAILER_WORDS
from signvote.ddp.options import TOPOLOGIES
from signvote.ddp.topology import chosen

#: Ways to exchange: DDP without a hook, torch's fp16_compress_hook, and the vote in each topology.
METHODS = ("allreduce", "fp16", *TOPOLOGIES)

#: torch.distributed._DEFAULT_FIRST_BUCKET_BYTES, and DistributedDataParallel's bucket_cap_mb.
FIRST_BUCKET_BYTES = 2**20
BUCKET_BYTES = 25 * 2**20

_BLOCK = 64  # coordinates, 8 bytes: what a shard is made of, see signvote.ddp.layout
_BLOCK_BYTES = 8
_TRAILER_BYTES = 4 * TRAILER_WORDS
_SEGMENT_BYTES = 2**20  # kMaxSegmentSize in gloo/allreduce.h


@dataclass(frozen=True)
class Link:
    """A worker's link to the others; all workers have the same.

    Attributes:
        bits_per_second: Rate in each direction.
        latency_seconds: One way, beside the host's part. Default: what a small message takes through a switch.
        efficiency: Payload's part of the rate. Default: Ethernet frames of 1538 bytes with preamble and gap, of which
            TCP/IP with timestamps leaves 1448; computed, not fitted.
        full_duplex: Sends at the full rate while it receives at the full rate.
        burst_bytes: What passes at once after a pause, where a token bucket limits the rate.
    """

    bits_per_second: float
    latency_seconds: float = 0.1e-3
    efficiency: float = 1448 / 1538
    full_duplex: bool = True
    burst_bytes: float = 0.0

    def seconds(self, payload: float) -> float:
        return 8 * payload / (self.bits_per_second * self.efficiency)


@dataclass(frozen=True)
class Host:
    """What gloo and the kernel cost at the ends of a message.

    The defaults were measured on a virtual machine with two CPUs, between network namespaces without a rate limit
    (bench/netlab.py): the time of all_gather and all-reduce of a few words between 2, 4 and 8 workers per message, what
    a message after a pause takes longer, the time of a float32 all-reduce of 104 MB per byte, and what float16 takes
    longer. `signvote plan` measures its own.

    Attributes:
        message_seconds: A message, without its bytes, when others have just come: system calls, and waking threads.
        wake_seconds: What the first message after a pause takes longer: the threads and the CPU have gone to sleep.
        byte_seconds: A byte of its payload, from memory to memory, with its part of a float32 sum.
        half_sum_seconds: A float16 coordinate that gloo adds, beyond that.
        cpu_share: Part of this time in which a CPU is busy.
        workers_per_cpu: Workers on one host over its CPUs, where they have not at least one each.
    """

    message_seconds: float = 0.42e-3
    wake_seconds: float = 0.3e-3
    byte_seconds: float = 2.0e-9
    half_sum_seconds: float = 4.5e-9
    cpu_share: float = 0.55
    workers_per_cpu: float = 0.0

    def seconds(self, payload: float, together: bool) -> float:
        """A message; ``together``: while all workers send theirs, so that each waits for the others on its CPU."""
        crowd = self.workers_per_cpu if together else 0.0
        bytes_seconds = max(1.0, self.cpu_share * crowd) * self.byte_seconds * payload
        return self._waiting(together) * self.message_seconds + bytes_seconds

    def waking(self, together: bool) -> float:
        """Before the first message of a phase."""
        return self._waiting(together) * self.wake_seconds

    def _waiting(self, together: bool) -> float:
        """How many times as long as with a CPU of its own."""
        return 1 + self.cpu_share * max(0.0, self.workers_per_cpu - 1) if together else 1.0

    def cpu_seconds(self, payload: float) -> float:
        return self.cpu_share * (self.message_seconds + self.byte_seconds * payload)

    @property
    def codec_slowdown(self) -> float:
        """Of what keeps a CPU busy all the time."""
        return max(1.0, self.workers_per_cpu)


@dataclass(frozen=True)
class Codec:
    """Seconds per coordinate: pack and unpack of a vote; one worker's bit in a vote; float32 to float16 and back."""

    pack: float
    vote: float
    unpack: float
    to_half: float
    from_half: float


@dataclass(frozen=True)
class Compute:
    """A step without any exchange.

    Attributes:
        seconds: Forward, backward and optimizer.
        backward_share: The backward pass's part of it, at the end of which the last bucket is ready. Default: the
            usual two multiplications backward for one forward.
        on_cpu: It computes on the CPUs that also exchange; with as many workers as CPUs they have no time left over.
    """

    seconds: float = 0.0
    backward_share: float = 2 / 3
    on_cpu: bool = False


@dataclass(frozen=True)
class Prediction:
    """One worker's step; of ``"server"``, that of rank 0, which has most to do.

    Attributes:
        bytes_sent, bytes_received: Payload.
        messages: How many it sends or receives, whichever is more.
        codec_seconds: Packing, counting votes and unpacking, or casts; without what rank 0 of ``"server"`` counts while
            messages arrive.
        exchange_seconds: All buckets one after the other, from gradient to result, with ``codec_seconds``.
        serial_seconds: The step if the exchange began after the backward pass.
        step_seconds: The step with the exchange of each bucket beside the rest of the backward pass, as DDP does it.
    """

    method: str
    workers: int
    bytes_sent: int
    bytes_received: int
    messages: int
    codec_seconds: float
    exchange_seconds: float
    serial_seconds: float
    step_seconds: float


def predict(
    method: str,
    buckets: Sequence[int],
    workers: int,
    link: Link,
    *,
    codec: Codec,
    element_bytes: int = 4,
    host: Host | None = None,
    compute: Compute | None = None,
) -> Prediction:
    """Predict a step of DDP.

    Args:
        method: One of :data:`METHODS`.
        buckets: Coordinates of each bucket, in the order in which the backward pass fills them: :func:`ddp_buckets`.
        workers: M.
        element_bytes: Of a gradient coordinate.
    """
    host, compute = host or Host(), compute or Compute()
    # Of many buckets only the first and the last differ.
    of_size = {numel: _exchange(method, numel, workers, codec, element_bytes, host) for numel in set(buckets)}
    beside_of_size = {numel: each.seconds(link, host) for numel, each in of_size.items()}
    exchanges = [of_size[numel] for numel in buckets]
    before = [host.codec_slowdown * each.before for each in exchanges]
    beside = [beside_of_size[numel] for numel in buckets]
    step_seconds = _overlapped(buckets, before, beside, compute)
    if compute.on_cpu and host.workers_per_cpu >= 1:
        # The CPUs that compute also do what the other thread does, for every worker on them.
        busy = host.workers_per_cpu * sum(each.cpu_seconds(host) for each in exchanges)
        step_seconds = max(step_seconds, compute.seconds + sum(before) + busy)
    exchange_seconds = sum(before) + sum(beside)
    return Prediction(
        method=method,
        workers=workers,
        bytes_sent=sum(each.bytes_sent for each in exchanges),
        bytes_received=sum(each.bytes_received for each in exchanges),
        messages=sum(each.messages for each in exchanges),
        codec_seconds=host.codec_slowdown * sum(each.before + each.between + each.after for each in exchanges),
        exchange_seconds=exchange_seconds,
        serial_seconds=compute.seconds + exchange_seconds,
        step_seconds=step_seconds,
    )


def ddp_buckets(
    coordinates: int, element_bytes: int = 4, *, first_bytes: int = FIRST_BUCKET_BYTES, cap_bytes: int = BUCKET_BYTES
) -> list[int]:
    """Coordinates of DDP's buckets, in the order of the backward pass, if all parameters were small.

    A large parameter, such as an embedding, makes a larger bucket: what is there does not get cut.
    """
    first, cap = max(1, first_bytes // element_bytes), max(1, cap_bytes // element_bytes)
    buckets = [min(first, coordinates)]
    left = coordinates - buckets[0]
    buckets += [cap] * (left // cap)
    if left % cap:
        buckets.append(left % cap)
    return buckets


def row_bytes(coordinates: int, shards: int) -> int:
    """One shard of a bucket's message: as :class:`signvote.ddp.layout.BucketLayout`, for one parameter."""
    blocks = -(-coordinates // _BLOCK)
    return max(1, -(-blocks // shards)) * _BLOCK_BYTES + _TRAILER_BYTES


@dataclass(frozen=True)
class _Phase:
    """Messages of one size: as many as go over the busiest link in each direction that it uses.

    Attributes:
        size: Bytes of one.
        latencies: How often the link's latency is waited for.
        together: All workers send and receive at the same time. Otherwise the link is used in one direction only.
        work: Seconds of computing for each message, while the next one is under way.
        asleep: A pause comes before it.
    """

    messages: int
    size: float
    latencies: float
    together: bool = True
    work: float = 0.0
    asleep: bool = True

    def seconds(self, link: Link, host: Host) -> float:
        turns = 1.0 if link.full_duplex or not self.together else 2.0
        paid = max(0.0, self.size - link.burst_bytes / max(1, self.messages))
        each = max(turns * link.seconds(paid), host.seconds(self.size, self.together) + self.work)
        waking = host.waking(self.together) if self.asleep else 0.0
        return waking + self.latencies * link.latency_seconds + self.messages * each

    def cpu_seconds(self, host: Host) -> float:
        return self.messages * (host.cpu_seconds(self.size) + self.work)


def _swap(size: int, workers: int) -> list[_Phase]:
    """Two latencies: the request and the message."""
    return [_Phase(workers - 1, size, 2)]


def _ring_all_reduce(size: int, workers: int, sum_seconds: float) -> list[_Phase]:
    """``sum_seconds`` for a byte that is added, beyond what is in the host's bytes."""
    segments = max(2 * workers, -(-size // _SEGMENT_BYTES))
    segments = -(-segments // workers) * workers
    messages = (workers - 1) * (segments // workers)
    each = size / segments
    return [
        _Phase(messages, each, workers - 1, work=sum_seconds * each),
        _Phase(messages, each, workers - 1, asleep=False),
    ]


def _gather_in_turn(size: int, workers: int, work: float) -> list[_Phase]:
    """At rank 0, which asks for one message after the other."""
    return [_Phase(workers - 1, size, 2 * (workers - 1), together=False, work=work)]


def _broadcast(size: int, workers: int) -> list[_Phase]:
    """Along the slowest branch."""
    return [_Phase(_tree_messages(workers), size, _depth(workers), together=False)]


def _depth(workers: int) -> int:
    return (workers - 1).bit_length()


@lru_cache
def _tree_messages(workers: int) -> int:
    """How many messages' time gloo's broadcast takes."""

    def after(rank: int) -> int:
        children = tree_children(rank, workers)
        # They share the link, so each has its message when all have it.
        return len(children) + max(map(after, children), default=0)

    return after(0)


@dataclass(frozen=True)
class _Exchange:
    """One bucket: what goes over the busiest link, and what a worker computes for it, in seconds.

    Attributes:
        before: On the thread that computes gradients.
        between: Counting votes, where that is not done while messages arrive.
        after: On the thread that exchanges, like all but ``before``.
    """

    bytes_sent: int
    bytes_received: int
    messages: int
    phases: list[_Phase]
    before: float
    between: float
    after: float

    def seconds(self, link: Link, host: Host) -> float:
        """On the thread that exchanges."""
        computing = host.codec_slowdown * (self.between + self.after)
        # The link has no pause within an exchange, after which its token bucket would be full again.
        steady = replace(link, burst_bytes=0.0)
        links = [link, *(steady for _ in self.phases[1:])]
        return sum(phase.seconds(one, host) for phase, one in zip(self.phases, links, strict=True)) + computing

    def cpu_seconds(self, host: Host) -> float:
        """Of the CPUs, for what that thread does."""
        return sum(phase.cpu_seconds(host) for phase in self.phases) + self.between + self.after


def _all_reduce(numel: int, workers: int, element_bytes: int, host: Host, casts: tuple[float, float]) -> _Exchange:
    phases = _ring_all_reduce(numel * element_bytes, workers, host.half_sum_seconds / 2 if element_bytes == 2 else 0.0)
    payload = math.ceil(sum(phase.messages * phase.size for phase in phases))
    messages = sum(phase.messages for phase in phases)
    return _Exchange(payload, payload, messages, phases, numel * casts[0], 0.0, numel * casts[1])


def _vote(topology: str, numel: int, workers: int, codec: Codec) -> _Exchange:
    topology = chosen(topology, numel, workers)
    others = workers - 1
    row = row_bytes(numel, workers if topology == "sharded" else 1)
    if topology == "sharded":
        sent = received = 2 * others * row
        messages = 2 * others
        phases = 2 * _swap(row, workers)
        counting = numel * codec.vote  # M votes on a shard
    elif topology == "allgather":
        sent = received = others * row
        messages = others
        phases = _swap(row, workers)
        counting = numel * workers * codec.vote
    else:
        sent, received = _depth(workers) * row, others * row
        messages = others + _depth(workers)
        phases = _gather_in_turn(row, workers, numel * codec.vote) + _broadcast(row, workers)
        counting = 0.0
    return _Exchange(sent, received, messages, phases, numel * codec.pack, counting, numel * codec.unpack)


def _exchange(method: str, numel: int, workers: int, codec: Codec, element_bytes: int, host: Host) -> _Exchange:
    if method == "allreduce":
        return _all_reduce(numel, workers, element_bytes, host, (0.0, 0.0))
    if method == "fp16":
        return _all_reduce(numel, workers, 2, host, (codec.to_half, codec.from_half))
    if method in TOPOLOGIES:
        return _vote(method, numel, workers, codec)
    raise ValueError(f"predict: method: expected one of {', '.join(METHODS)}, got {method!r}")


def _overlapped(buckets: Sequence[int], before: Sequence[float], beside: Sequence[float], compute: Compute) -> float:
    """Seconds of a step in which buckets become ready in turn, and another thread exchanges them in turn."""
    backward = compute.seconds * compute.backward_share
    computed = compute.seconds - backward
    exchanged = 0.0
    coordinates = sum(buckets)
    for numel, own, others in zip(buckets, before, beside, strict=True):
        computed += backward * numel / coordinates + own
        exchanged = max(exchanged, computed) + others
    return max(computed, exchanged)


def break_even(slow: Callable[[Link], float], fast: Callable[[Link], float], link: Link) -> float | None:
    """The rate in bits per second from which on ``slow`` takes no longer than ``fast``; 0: at every; None: at none.

    Args:
        slow, fast: Seconds over a link; ``slow`` sends more and computes less.
        link: Its other properties stay.
    """

    def lead(exponent: float) -> float:
        at = replace(link, bits_per_second=10.0**exponent)
        return slow(at) - fast(at)

    low, high = 3.0, 15.0  # a modem, and far beyond any link
    if lead(high) > 0:
        return None
    if lead(low) <= 0:
        return 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if lead(middle) > 0 else (low, middle)
    return float(10.0**high)


def crowded_from(coordinates: int, link: Link, host: Host) -> float:
    """From how many workers on a message of the sharded exchange takes the host longer than the link.

    It has d/(8·M) bytes, a shard; each of them takes the link and the host its time, and the message takes the
    host ``message_seconds`` besides. Beyond this, an exchange takes longer with every worker, however fast the link.

    Args:
        coordinates: d, of the bucket.
    """
    each = coordinates / 8
    return max(0.0, link.seconds(each) - host.byte_seconds * each) / host.message_seconds
