"""The ops on ternary ballots: two bits for each coordinate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from signvote import ops
from signvote.cli.bench import expected, peers
from signvote.cli.bench.cases.data import Data, aligned, spoil
from signvote.cli.bench.cases.field import SCALE, Case, Field, Options, checker, vote_checker
from signvote.cli.bench.measure import Contender

THRESHOLD = 0.5  # which about 38% of the normal variates are not above
QUORUM = 2


def pack_ternary(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    x = data.gradient(case.dtype, case.numel)
    out = aligned(2 * (case.numel // 32), np.uint32).reshape(2, -1)
    check = checker(out, expected.pack_ternary(x, THRESHOLD))
    field = Field(case, options)
    limits = field.place.limits
    argument, planes = field.place.arguments([x], [out])
    field.ops(lambda **how: ops.pack_ternary(argument, threshold=THRESHOLD, out=planes, **how), check)
    field.limit("read", lambda threads: limits.read(x, threads))
    field.numpy(lambda: peers.numpy_pack_ternary(x, THRESHOLD, out), check)
    if not field.is_on_cpu:
        tensor, tensor_out = field.place.tensors([x], [out])
        field.peer("torch", lambda: peers.torch_pack_ternary(tensor, THRESHOLD, tensor_out), check)
    return field.done(x.nbytes)


def unpack_ternary(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    planes = data.rows(2, case.numel)
    out = aligned(case.numel, case.stored_dtype)

    def check(label: str) -> None:
        expected.check_unpacked_ternary(label, out, planes, SCALE)
        spoil(out)

    field = Field(case, options)
    limits = field.place.limits
    argument, target = field.place.arguments([planes], [out])
    field.ops(lambda **how: ops.unpack_ternary(argument, case.numel, scale=SCALE, out=target, **how), check)
    field.limit("write", lambda threads: limits.write(out, 1, threads))
    field.numpy(lambda: peers.numpy_unpack_ternary(planes, SCALE, out), check)
    if not field.is_on_cpu:
        tensor, tensor_out = field.place.tensors([planes], [out])
        field.peer("torch", lambda: peers.torch_unpack_ternary(tensor, SCALE, tensor_out), check)
    return field.done(out.nbytes)


def majority_vote_ternary(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    assert case.rows is not None
    stack = data.ballots(case.rows, case.numel)
    out = aligned(2 * stack.shape[2], np.uint32).reshape(2, -1)
    check = vote_checker(out, lambda label: expected.check_vote_ternary(label, out, stack, case.numel, QUORUM))
    field = Field(case, options)
    limits = field.place.limits
    argument, voted = field.place.arguments([stack], [out])
    field.ops(
        lambda **how: ops.majority_vote_ternary(argument, quorum=QUORUM, numel=case.numel, out=voted, **how), check
    )
    if field.is_on_cpu:
        rows_of_planes = [list(stack[:, plane]) for plane in range(2)]

        def each_plane(limit: Callable[..., object]) -> Callable[[int], object]:
            def call(threads: int) -> None:
                for rows, plane in zip(rows_of_planes, out, strict=True):
                    limit(rows, plane, threads)

            return call

        field.limit("xor_rows", each_plane(limits.xor_rows))
        field.limit("read_rows_then_write", each_plane(limits.read_rows_then_write))
    else:
        field.limit("read_rows_then_write", lambda threads: limits.read_rows_then_write(stack, out, threads))
    field.numpy(lambda: peers.numpy_vote_ternary(stack, QUORUM, out), check)
    if not field.is_on_cpu and field.has_peers:
        votes = torch.from_numpy(expected.unpack_ternary(stack, case.numel)).to(field.place.device)
        lead = torch.empty(case.numel, dtype=torch.int16, device=field.place.device)

        def check_torch(label: str) -> None:
            found = lead.cpu().numpy()
            words = np.stack([expected.pack_bits(found > 0), expected.pack_bits(found != 0)])
            expected.check_vote_ternary(label, words, stack, case.numel, QUORUM)

        field.peer("torch", lambda: peers.torch_vote_ternary(votes, QUORUM, lead), check_torch)
    return field.done((case.rows + 1) * out.nbytes)
