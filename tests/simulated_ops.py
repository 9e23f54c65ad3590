"""What takes the place of CUDA, of the kernels and of NCCL while work is done on the simulated device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from signvote import cuda, cuda_runs, runs
from signvote.ddp import channel
from simulated_cuda import (
    CUDA,
    DEVICE,
    Device,
    Event,
    Future,
    Stream,
    Tensor,
    checked_stream_context,
    current_stream,
    device_context,
    new_memory,
    pin_memory,
    raw,
)


def pack_runs(
    bucket: Any, momentum: Any, coefficients: Any, pieces: Any, out: Any, counts: Any, *, zeros: str, seed: int
) -> None:
    source, kept, words, found = (None if x is None else raw(x) for x in (bucket, momentum, out, counts))

    def kernel() -> None:
        assert source is not None
        assert words is not None
        assert found is not None
        counted = runs.pack_runs(source, kept, coefficients, pieces, words, zeros=zeros, seed=seed)
        found[:] = torch.tensor(counted, device="cpu")

    DEVICE.current().queue(kernel, bucket, momentum, out, counts)


def unpack_runs(words: Any, pieces: Any, bucket: Any, *, scale: float) -> None:
    source, target = raw(words), raw(bucket)
    DEVICE.current().queue(lambda: runs.unpack_runs(source, pieces, target, scale=scale), words, bucket)


def pack_ternary_runs(bucket: Any, pieces: Any, out: Any, counts: Any, *, stride: int, threshold: float) -> None:
    source, words, found = map(raw, (bucket, out, counts))

    def kernel() -> None:
        counted = runs.pack_ternary_runs(source, pieces, words, stride=stride, threshold=threshold)
        found[:] = torch.tensor(counted, device="cpu")

    DEVICE.current().queue(kernel, bucket, out, counts)


def unpack_ternary_runs(words: Any, pieces: Any, stride: int, bucket: Any, *, scale: float) -> None:
    source, target = raw(words), raw(bucket)

    def kernel() -> None:
        runs.unpack_ternary_runs(source, pieces, stride, target, scale=scale)

    DEVICE.current().queue(kernel, words, bucket)


def vote_runs(rows: Any, pieces: Any, out: Any, counts: Any, *, ties: str, seed: int) -> None:
    stack, words, found = map(raw, (rows, out, counts))
    DEVICE.current().queue(
        lambda: found.fill_(runs.vote_runs(stack, pieces, words, ties=ties, seed=seed)), rows, out, counts
    )


def vote_ternary_runs(rows: Any, pieces: Any, out: Any, counts: Any, *, stride: int, quorum: int) -> None:
    stack, words, found = map(raw, (rows, out, counts))
    DEVICE.current().queue(
        lambda: found.fill_(runs.vote_ternary_runs(stack, pieces, words, stride=stride, quorum=quorum)),
        rows,
        out,
        counts,
    )


class DeviceRuns:
    @staticmethod
    def of(table: Any, num_coordinates: int, num_words: int, device: torch.device) -> Any:
        return table


def creating(create: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """``create``, also on the device."""

    def created(*arguments: Any, **options: Any) -> Any:
        if options.get("device") != CUDA:
            return create(*arguments, **options)
        found = create(*arguments, **options | {"device": "cpu"})
        memory = new_memory(found)
        target = raw(memory)
        DEVICE.current().queue(lambda: target.copy_(found), memory)
        return memory

    return created


class Nccl:
    """NCCL's collectives between simulated devices of several processes: those of gloo, in the order of the stream."""

    @staticmethod
    def mark() -> None:
        stream = DEVICE.current()
        DEVICE.collectives.append((stream, len(stream.tasks)))

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def new_group(*arguments: Any, **options: Any) -> Any:
        options["backend"] = options["backend"].removesuffix(",cuda:nccl")
        return right_new_group(*arguments, **options)

    @staticmethod
    def all_to_all_single(received: Any, sent: Any, *, group: Any) -> None:
        target, source = raw(received), raw(sent)
        Nccl.mark()
        DEVICE.current().queue(lambda: right_all_to_all(target, source, group=group), received, sent)

    @staticmethod
    def all_gather(received: Any, sent: Any, *, group: Any) -> None:
        if not isinstance(received, Tensor):
            right_all_gather(received, sent, group=group)
            return
        target, source = raw(received), raw(sent)
        Nccl.mark()
        DEVICE.current().queue(lambda: right_all_gather(target, source.clone(), group=group), received, sent)


right_new_group, right_all_to_all, right_all_gather = dist.new_group, dist.all_to_all_single, channel._all_gather


def generator(device: torch.device | str = "cpu") -> torch.Generator:
    return right_generator("cpu")


right_generator = torch.Generator

PATCHES: dict[Any, dict[str, Any]] = {
    torch.cuda: {
        "Stream": Stream,
        "Event": Event,
        "current_stream": current_stream,
        "stream": checked_stream_context,
        "device": device_context,
        "is_current_stream_capturing": lambda: False,
    },
    torch.futures: {"Future": Future},
    torch: {"Generator": generator, "zeros": creating(torch.zeros), "full": creating(torch.full)},
    dist: {
        "is_nccl_available": Nccl.is_available,
        "new_group": Nccl.new_group,
        "all_to_all_single": Nccl.all_to_all_single,
    },
    channel: {"_all_gather": Nccl.all_gather},
    torch.Tensor: {"pin_memory": pin_memory},
    cuda: {"module_for": lambda op, name, device: None},
    cuda_runs: {
        "pack_runs": pack_runs,
        "unpack_runs": unpack_runs,
        "pack_ternary_runs": pack_ternary_runs,
        "unpack_ternary_runs": unpack_ternary_runs,
        "vote_runs": vote_runs,
        "vote_ternary_runs": vote_ternary_runs,
        "DeviceRuns": DeviceRuns,
    },
}


@contextmanager
def simulated() -> Iterator[Device]:
    """torch and signvote find the simulated device in place of CUDA."""
    DEVICE.clear()
    with ExitStack() as stack:
        for target, names in PATCHES.items():
            stack.enter_context(mock.patch.multiple(target, **names))
        yield DEVICE
