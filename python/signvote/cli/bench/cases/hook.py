"""Several ops in a row, as in the hook."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from signvote import ops
from signvote.cli.bench import expected
from signvote.cli.bench.cases.data import Data, aligned, spoil
from signvote.cli.bench.cases.field import SCALE, SEED, Case, Field, Options
from signvote.cli.bench.expected import check_equal
from signvote.cli.bench.measure import Contender
from signvote.ddp.layout import BucketLayout, MessageLayout

SHARDS = 8  # workers of the codec of a sharded vote


def codec(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    """What one of SHARDS workers computes in a sharded vote: pack all, vote on its share, unpack all."""
    x = data.gradient("float32", case.numel)
    share = -(-case.numel // SHARDS // 64) * 64
    rows = data.rows(SHARDS, share)
    words, vote = aligned(case.numel // 32, np.uint32), aligned(rows.shape[1], np.uint32)
    bucket = aligned(case.numel, np.float32)
    right = expected.pack_signs(x, SEED)

    def check(label: str) -> None:
        check_equal(label, words, right)
        expected.check_vote(label, vote, rows, share, SEED)
        expected.check_unpacked(label, bucket, right, SCALE)
        spoil(words, vote, bucket)

    def call(**how: Any) -> None:
        ops.pack_signs(x, seed=SEED, out=words, **how)
        ops.majority_vote(rows, seed=SEED, numel=share, out=vote, **how)
        ops.unpack_signs(words, case.numel, scale=SCALE, out=bucket, **how)

    field = Field(case, options)
    field.ops(call, check)
    limits = field.place.limits
    field.limit("copy", lambda threads: limits.copy(x, bucket, threads))
    return field.contenders, x.nbytes + bucket.nbytes


def hook_bytes(numel: int) -> int:
    """Of the message that the hook copies to the host for a bucket of ``numel`` coordinates, and of the one back."""
    return MessageLayout(BucketLayout([numel], [0], SHARDS)).new_message().nbytes


def round_trip(case: Case, data: Data, options: Options) -> tuple[list[Contender], int]:
    """Pack, copy as many bytes to pinned memory as the hook, and back, unpack: all on one stream, in one run."""
    x = data.gradient("float32", case.numel)
    bucket = aligned(case.numel, np.float32)
    right = expected.pack_signs(x, SEED)
    field = Field(case, options)
    gradient, target = field.place.tensors([x], [bucket])
    pinned = torch.empty(hook_bytes(case.numel) // 4, dtype=torch.int32).pin_memory()
    message = torch.zeros_like(pinned, device=field.place.device)
    words = message[: case.numel // 32]

    def there_and_back() -> None:
        pinned.copy_(message, non_blocking=True)
        message.copy_(pinned, non_blocking=True)

    def call(**how: Any) -> None:
        ops.pack_signs(gradient, seed=SEED, out=words, **how)
        there_and_back()
        ops.unpack_signs(words, case.numel, scale=SCALE, out=target, **how)

    def check(label: str) -> None:
        expected.check_unpacked(label, bucket, right, SCALE)
        spoil(bucket)

    field.ops(call, check)
    field.limit("transfer", lambda threads: there_and_back())
    return field.contenders, x.nbytes + bucket.nbytes + 2 * message.nbytes
