"""A vote whose ballots arrive one after another: counts instead of the ballots themselves."""

from __future__ import annotations

from typing import Any, Generic, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray

from signvote import _core
from signvote.arguments import check_same_kind, input_words, to_integer, words_out, written_words
from signvote.ops import Array, choices

_MAX_VOTES = 2**31 - 1


class VoteTally(Generic[Array]):
    """Counts votes of words as they arrive, and decides as :func:`signvote.majority_vote` does on all of them at once.

    It holds the bits of one count per coordinate, ``max_votes.bit_length()`` words for each word of a vote: 3 MB of
    counts for 7 votes of 1 MB, 8 MB for 255. The order of votes, and of merging tallies, changes nothing.

    Equivalent to: ``counts += weight * bits`` for the unpacked ``bits`` of each vote.

    Args:
        numel: How many coordinates a vote has.
        max_votes: The most votes that may be added, weights counted, 1 to 2**31 - 1.

    Attributes:
        numel, max_votes: As given.
        num_votes: How many votes have been added, weights counted.

    Raises:
        TypeError: ``numel`` or ``max_votes`` is not an integer.
        ValueError: They are out of range.

    Example::

        tally = signvote.VoteTally(numel, max_votes=4)
        for words in arriving:
            tally.add(words)
        votes = tally.decide()
    """

    def __init__(self, numel: SupportsIndex, max_votes: SupportsIndex) -> None:
        op = "VoteTally"
        self.numel = to_integer(op, "numel", numel, 0, 2**63 - 1)
        self.max_votes = to_integer(op, "max_votes", max_votes, 1, _MAX_VOTES)
        self.num_votes = 0
        self._planes = np.zeros((self.max_votes.bit_length(), (self.numel + 31) // 32), np.uint32)
        self._like: Array | None = None

    @property
    def planes(self) -> NDArray[np.uint32]:
        """Row ``j`` holds bit ``j`` of all counts, as words; higher bits than these are 0."""
        return self._planes[: max(1, self.num_votes.bit_length())]

    def add(
        self,
        words: Array,
        weight: SupportsIndex = 1,
        *,
        implementation: str | None = None,
        num_threads: SupportsIndex | None = None,
    ) -> None:
        """Count ``weight`` votes for the signs in ``words``.

        Args:
            words: ``num_words(numel)`` words, NumPy arrays or CPU tensors like those before. Unused bits may be set.
            weight: 1 or more.
            implementation, num_threads: As in :func:`signvote.pack_signs`.

        Raises:
            TypeError: ``words`` has another type or dtype, or ``weight`` is not an integer.
            ValueError: ``words`` has another size or is not contiguous, or there would be more than ``max_votes``.
                Nothing is counted then.
        """
        op = "VoteTally.add"
        self._check_kind(op, "words", words)
        source = input_words(op, "words", words)
        votes = to_integer(op, "weight", weight, 1, _MAX_VOTES)
        planes = self._planes_for(op, "weight", votes)
        _core.tally_add(planes, source, votes, *choices(implementation, num_threads))
        self.num_votes += votes
        self._like = words[:0]

    def merge(
        self,
        other: VoteTally[Array],
        *,
        implementation: str | None = None,
        num_threads: SupportsIndex | None = None,
    ) -> None:
        """Add all votes of ``other``, another tally of as many coordinates, which stays as it is.

        Raises:
            TypeError: ``other`` is no ``VoteTally``, or one of votes of another type.
            ValueError: It has another ``numel``, is this tally itself, or there would be more than ``max_votes``.
                Nothing is added then.
        """
        op = "VoteTally.merge"
        if not isinstance(other, VoteTally):
            raise TypeError(f"{op}: other is a {type(other).__name__}, expected a VoteTally")
        if other is self:
            raise ValueError(f"{op}: other is this tally itself, expected another one")
        if other.numel != self.numel:
            raise ValueError(f"{op}: other has {other.numel} coordinates, expected {self.numel}")
        if other.num_votes == 0:
            return
        self._check_kind(op, "other", other._like)
        planes = self._planes_for(op, "other", other.num_votes)
        _core.tally_merge(planes, other.planes, *choices(implementation, num_threads))
        self.num_votes += other.num_votes
        self._like = other._like

    def clear(self) -> None:
        """Back to no votes, in the same memory."""
        self._planes.fill(0)
        self.num_votes = 0

    def counts(self) -> Array:
        """How many of the ``num_votes`` votes were positive, per coordinate: int32, tensor or array like the votes."""
        counts = np.empty(self.numel, np.int32)
        _core.tally_counts(self.planes, self.numel, counts)
        result: Any = torch.from_numpy(counts) if isinstance(self._like, torch.Tensor) else counts
        return result

    def decide(
        self,
        *,
        ties: str = "coin",
        seed: SupportsIndex = 0,
        quorum: SupportsIndex | None = None,
        out: Array | None = None,
        implementation: str | None = None,
        num_threads: SupportsIndex | None = None,
    ) -> Array:
        """The majority of the votes so far; more may be added afterwards.

        Equivalent to: ``majority_vote(stack, ties=ties, seed=seed, numel=numel)`` for the stack of all votes, each as
        often as its weight says. With ``quorum``: ``np.where(abs(n_plus - n_minus) < quorum, 0, n_plus - n_minus)``,
        as the planes sign (1 where this is positive) and active (1 where it is not 0).

        Args:
            ties, seed: As in :func:`signvote.majority_vote`; without effect if ``quorum`` is given.
            quorum: 1 or more: by how many votes one sign must lead.
            out: W words, with ``quorum`` ``(2, W)`` words, to write to.
            implementation, num_threads: As in :func:`signvote.pack_signs`.

        Returns:
            ``out``, or new words.

        Raises:
            TypeError: ``out`` has another type or dtype, or ``quorum`` is not an integer.
            ValueError: There are no votes; ``out`` has another shape, is read-only or requires gradients; ``ties``,
                ``seed`` or ``quorum`` is none of the above.
        """
        op = "VoteTally.decide"
        if self._like is None or self.num_votes == 0:
            raise ValueError(f"{op}: the tally has 0 votes, expected 1 or more")
        chosen = choices(implementation, num_threads)
        width = self._planes.shape[1]
        result: Any
        if quorum is None:
            result, words = words_out(op, self._like, (width,), out)
            _core.tally_decide(self.planes, self.num_votes, self.numel, ties, seed, words, *chosen)
        else:
            lead = to_integer(op, "quorum", quorum, 1, 2**63 - 1)
            result, words = words_out(op, self._like, (2, width), out)
            _core.tally_decide_ternary(self.planes, self.num_votes, lead, self.numel, words, *chosen)
        return result

    def decide_runs(
        self,
        runs: NDArray[np.int64],
        out: torch.Tensor,
        *,
        ties: str,
        seed: int,
        implementation: str | None = None,
        num_threads: SupportsIndex | None = None,
    ) -> int:
        """Of votes that are messages: :func:`signvote.runs.vote_runs` on all of them. Returns how many were tied."""
        words = written_words("VoteTally.decide_runs", "out", out)
        chosen = choices(implementation, num_threads)
        return _core.tally_decide(self.planes, self.num_votes, runs, ties, seed, words, *chosen)

    def _check_kind(self, op: str, name: str, votes: object) -> None:
        if self._like is not None:
            check_same_kind(op, name, votes, self._like)

    def _planes_for(self, op: str, name: str, votes: int) -> NDArray[np.uint32]:
        """The planes that the counts need after this many more votes."""
        total = self.num_votes + votes
        if total > self.max_votes:
            left = self.max_votes - self.num_votes
            raise ValueError(f"{op}: {name} is {votes} votes, expected at most {left} more of {self.max_votes}")
        return self._planes[: total.bit_length()]
