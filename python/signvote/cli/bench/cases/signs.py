"""The ops on signs: one bit for each coordinate."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from signvote import ops
from signvote.cli.bench import expected, peers
from signvote.cli.bench.cases.data import Data, aligned, spoil
from signvote.cli.bench.cases.field import SCALE, SEED, Case, Field, Options, checker, vote_checker
from signvote.cli.bench.expected import check_equal
from signvote.cli.bench.measure import Contender

BETA = 0.9


def pack_signs(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    x = data.gradient(case.dtype, case.numel, case.zeros)
    out = aligned(case.numel // 32, np.uint32)
    right = expected.pack_signs(x, SEED)
    check = checker(out, right)
    field = Field(case, options)
    limits = field.place.limits
    argument, words = field.place.arguments([x], [out])
    field.ops(lambda **how: ops.pack_signs(argument, seed=SEED, out=words, **how), check)
    field.limit("read", lambda threads: limits.read(x, threads))
    if case.zeros == "none":
        tensor, tensor_out = field.place.tensors([x], [out])
        signs = expected.pack_signs(x, None)
        field.numpy(lambda: peers.numpy_pack(x, out), checker(out, signs))
        field.peer("torch", lambda: peers.torch_pack(tensor, tensor_out), checker(out, signs))
        if not field.is_on_cpu and case.dtype != "bfloat16" and peers.find_cupy():
            field.peer("cupy", lambda: peers.cupy_pack(tensor, tensor_out), checker(out, signs))
    return field.done(x.nbytes)


def pack_momentum(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    x = data.gradient(case.dtype, case.numel)
    out = aligned(case.numel // 32, np.uint32)
    m = aligned(case.numel, "float64" if case.dtype == "float64" else "float32")

    def start() -> None:
        m[:] = expected.to_float32(x)[::-1]

    start()
    right = expected.momentum(x, m, BETA)
    signs = expected.pack_signs(right, SEED)

    def check(label: str) -> None:
        check_equal(label, m, right)
        check_equal(label, out, signs)
        start()

    field = Field(case, options)
    limits = field.place.limits
    argument, momentum, words = field.place.arguments([x], [m, out])
    coefficients = (BETA, 1 - BETA, BETA, 1 - BETA)
    field.ops(
        lambda **how: ops.pack_momentum(argument, momentum, coefficients=coefficients, seed=SEED, out=words, **how),
        check,
    )
    # XOR leaves numbers of any kind: it has a momentum of its own.
    kept = aligned(case.numel, m.dtype)
    field.limit("update", lambda threads: limits.update(x, kept, threads))

    def check_roughly(label: str) -> None:
        if not np.allclose(m, right, rtol=1e-3, atol=1e-6):
            raise expected.WrongResultError(f"{label}: the momentum is wrong")
        start()

    scratch = aligned(case.numel, m.dtype)
    gradient, momentum_tensor, tensor_out = field.place.tensors([x], [m, out])

    def torch_peer() -> None:
        peers.torch_pack_momentum(gradient, momentum_tensor, BETA, tensor_out)

    field.numpy(lambda: peers.numpy_pack_momentum(x, m, BETA, scratch, out), check_roughly)
    field.peer("torch", torch_peer, check_roughly)
    return field.done(x.nbytes + 2 * m.nbytes)


def unpack_signs(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    words = data.words(case.numel)
    out = aligned(case.numel, case.stored_dtype)

    def check(label: str) -> None:
        expected.check_unpacked(label, out, words, SCALE)
        spoil(out)

    field = Field(case, options)
    limits = field.place.limits
    argument, target = field.place.arguments([words], [out])
    field.ops(lambda **how: ops.unpack_signs(argument, case.numel, scale=SCALE, out=target, **how), check)
    field.limit("write", lambda threads: limits.write(out, 1, threads))
    if field.is_on_cpu:
        field.limit("repeat", lambda threads: limits.repeat(words, out, threads))
    tensor, tensor_out = field.place.tensors([words], [out])
    field.numpy(lambda: peers.numpy_unpack(words, SCALE, out), check)
    field.peer("torch", lambda: peers.torch_unpack(tensor, SCALE, tensor_out), check)
    return field.done(out.nbytes)


def majority_vote(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    assert case.rows is not None
    rows = data.rows(case.rows, case.numel)
    out = aligned(rows.shape[1], np.uint32)
    check = vote_checker(out, lambda label: expected.check_vote(label, out, rows, case.numel, SEED))
    field = Field(case, options)
    limits = field.place.limits
    argument, voted = field.place.arguments([rows], [out])
    field.ops(lambda **how: ops.majority_vote(argument, seed=SEED, numel=case.numel, out=voted, **how), check)
    row_list = list(rows)
    if field.is_on_cpu:
        field.limit("xor_rows", lambda threads: limits.xor_rows(row_list, out, threads))
    many: Any = row_list if field.is_on_cpu else rows
    field.limit("read_rows_then_write", lambda threads: limits.read_rows_then_write(many, out, threads))
    if field.has_peers:
        signs = torch.from_numpy((2 * expected.unpack_bits(rows, case.numel) - 1).view(np.int8)).to(field.place.device)
        majority = torch.empty(case.numel, dtype=torch.int16, device=field.place.device)

        def check_numpy(label: str) -> None:
            expected.check_vote(label, out, rows, case.numel, None)

        def check_torch(label: str) -> None:
            expected.check_vote(label, expected.pack_bits((majority > 0).cpu().numpy()), rows, case.numel, None)

        field.numpy(lambda: peers.numpy_vote(row_list, out), check_numpy)
        field.peer("torch", lambda: peers.torch_vote(signs, majority), check_torch)
    return field.done((case.rows + 1) * out.nbytes)
