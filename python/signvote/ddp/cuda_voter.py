"""The vote on a CUDA device, where the messages are if they travel from device to device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from signvote import cuda_runs
from signvote.ddp.layout import MessageLayout
from signvote.ddp.options import VoteOptions
from signvote.ddp.stats import Counters
from signvote.ddp.voter import Voter


class CudaVoter(Voter):
    """Votes on the stream that is current, and waits for it. Each vote counts once.

    Args:
        shard: That on which this rank votes.
    """

    def __init__(
        self,
        sent: MessageLayout,
        result: MessageLayout,
        shard: int,
        size: int,
        dtype: torch.dtype,
        options: VoteOptions,
        counters: Counters,
        device: torch.device,
    ) -> None:
        super().__init__(sent, result, shard, size, dtype, options, counters, None, device)
        self._table = cuda_runs.DeviceRuns.of(self._runs, sent.bucket.numel, result.row_words, device)
        self._counts = torch.zeros(1, dtype=torch.int64, device=device)
        self._two_planes: torch.Tensor | None = None
        if sent.num_planes < result.num_planes:  # all vote, and yet the outcome can be zero
            self._two_planes = torch.full((size, 2 * sent.stride), -1, dtype=torch.int32, device=device)

    def _can_vote_on_all(self, weights: npt.NDArray[np.int64]) -> bool:
        return True

    def _vote_on_all(self, rows: torch.Tensor, words: torch.Tensor) -> int:
        if self._result.num_planes == 1:
            cuda_runs.vote_runs(rows, self._table, words, self._counts, **self._ties)
        else:
            if self._two_planes is not None:
                self._two_planes[:, : self._sent.stride] = rows
                rows = self._two_planes
            cuda_runs.vote_ternary_runs(rows, self._table, words, self._counts, **self._lead)
        return int(self._counts)
