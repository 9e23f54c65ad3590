"""Packing and unpacking on the CPU, in the memory of the exchange itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from signvote.ddp.ballot import Ballot
from signvote.ddp.codec import Codec, Layouts, Packed
from signvote.ddp.layout import MessageLayout
from signvote.ddp.numbers import NO_NUMBERS
from signvote.ddp.options import Coefficients
from signvote.ddp.stats import Counters
from signvote.ddp.topology import Exchange
from signvote.runs import pack_runs, pack_ternary_runs, unpack_runs, unpack_ternary_runs


class CpuCodec(Codec):
    """What is begun is done when a call returns."""

    def __init__(self, layouts: Layouts, exchange: Exchange, counters: Counters, implementation: str | None) -> None:
        super().__init__(layouts, exchange, counters)
        self._implementation = implementation
        self._num_threads = 1
        self._scratch: torch.Tensor | None = None
        self._packed = Packed(0, 0, NO_NUMBERS)
        self._zeros_counted = self._nonfinite = 0

    def on_device(self) -> AbstractContextManager[object]:
        return nullcontext()

    def pack(self, bucket: torch.Tensor, momentum: torch.Tensor | None, ballot: Ballot, *, is_last: bool) -> None:
        self._num_threads = torch.get_num_threads()  # of the thread that computes: torch has a setting for each
        # Beside the backward pass the worker thread takes no other CPU from it; after the last bucket it is over.
        self.num_threads_of_worker = self._num_threads if is_last else 1
        start = time.perf_counter()
        self._zeros_counted = self._nonfinite = 0
        self._write(bucket, momentum, ballot, self._exchange.sent.words)
        found = self._magnitudes(bucket, ballot)
        self._packed = Packed(
            zeros=self._zeros(self._zeros_counted),
            nonfinite=self._nonfinite_of(self._nonfinite, bucket.dtype),
            magnitudes=NO_NUMBERS if found is None else found.numpy(),
        )
        self._counters.pack_seconds += time.perf_counter() - start

    @property
    def _chosen(self) -> dict[str, Any]:
        return {"implementation": self._implementation, "num_threads": self._num_threads}

    def _scratch_words(self, layout: MessageLayout) -> torch.Tensor:
        if self._scratch is None:
            self._scratch = layout.new_message()
        return self._scratch

    def keep(self, bucket: torch.Tensor, momentum: torch.Tensor, coefficients: Coefficients) -> None:
        layout = self._kept_layout
        words = self._scratch_words(layout).view(-1)
        _, self._nonfinite = pack_runs(
            bucket, momentum, coefficients, layout.runs, words, zeros="negative", seed=0, **self._chosen
        )

    def vote(self, x: torch.Tensor, momentum: torch.Tensor | None, ballot: Ballot) -> None:
        self._zeros_counted, nonfinite = pack_runs(
            x,
            momentum,
            ballot.coefficients,
            self._sent_layout.runs,
            self._exchange.sent.words.view(-1),
            zeros=ballot.zeros,
            seed=ballot.seed,
            **self._chosen,
        )
        self._nonfinite = max(self._nonfinite, nonfinite)

    def vote_or_abstain(self, x: torch.Tensor, threshold: float) -> None:
        nonfinite = self._pack_ternary(x, threshold, self._exchange.sent.words)
        self._nonfinite = max(self._nonfinite, nonfinite)

    def abstain_at_zeros_of(self, bucket: torch.Tensor) -> None:
        scratch = self._scratch_words(self._sent_layout)
        self._pack_ternary(bucket, 0.0, scratch)
        self._mask(self._exchange.sent.words, scratch)

    def _pack_ternary(self, x: torch.Tensor, threshold: float, words: torch.Tensor) -> int:
        layout = self._sent_layout
        _, nonfinite = pack_ternary_runs(
            x, layout.runs, words.view(-1), stride=layout.stride, threshold=threshold, **self._chosen
        )
        return nonfinite

    def settle(self) -> None:
        pass

    def packed(self) -> Packed:
        return self._packed

    def unpack(self, bucket: torch.Tensor, *, scale: float | Sequence[float]) -> None:
        start = time.perf_counter()
        self._num_threads = self.num_threads_of_worker
        self._read(bucket, scale, self._exchange.result.words)
        self._counters.unpack_seconds += time.perf_counter() - start

    def progress(self, bucket: torch.Tensor) -> Callable[[], float]:
        self._num_threads = self.num_threads_of_worker
        progress = float(self._progress(bucket, self._exchange.result.words))
        return lambda: progress

    def _unpack_signs(self, words: torch.Tensor, target: torch.Tensor, scale: float) -> None:
        layout = self._result_layout
        if layout.num_planes == 1:
            unpack_runs(words.view(-1), layout.runs, target, scale=scale, **self._chosen)
        else:
            unpack_ternary_runs(words.view(-1), layout.runs, layout.stride, target, scale=scale, **self._chosen)

    def fill(self, bucket: torch.Tensor, value: float) -> None:
        bucket.fill_(value)

    def new_future(self) -> torch.futures.Future[Any]:
        return torch.futures.Future()

    def hand_over(self) -> None:
        pass
