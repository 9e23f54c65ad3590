"""A vote whose ballots arrive one after another: counts instead of the ballots themselves."""

from __future__ import annotations

from typing import Any, Generic, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray

from signvote import _core
from signvote.arguments import (
    Array,
    check_same_kind,
    input_words,
    to_integer,
    to_numel,
    words_for,
    words_out,
    written_words,
)
from signvote.implementation import choices

_MAX_VOTES = 2**31 - 1


class VoteTally(Generic[Array]):
    """Counts votes of words as they arrive, and decides as :func:`signvote.majority_vote` does on all of them at once.

    It holds the bits of one count per coordinate, ``max_votes.bit_length()`` words for each word of a vote: 3 MB of
    counts for 7 votes of 1 MB, 8 MB for 255. The order of votes, and of merging tallies, changes nothing.

    With ``ternary`` votes may abstain: they are the ``(2, W)`` words of :func:`signvote.pack_ternary`, and a vote that
    is 0 at a coordinate counts for neither sign there, whatever its weight. The counts take one bit more.

    Equivalent to: ``counts += weight * bits`` for the unpacked ``bits`` of each vote; with ``ternary``,
    ``lead += weight * values`` for its unpacked ``values``, each 1, 0 or -1.

    Args:
        numel: How many coordinates a vote has.
        max_votes: The most votes that may be added, weights counted, 1 to 2**31 - 1. Memory is taken up when votes
            come that need it.
        ternary: Whether votes may abstain.

    Attributes:
        numel, max_votes, ternary: As given.
        num_votes: How many votes have been added, weights counted, with those that abstain.

    Raises:
        TypeError: ``numel`` or ``max_votes`` is not an integer.
        ValueError: They are out of range.

    Example::

        tally = signvote.VoteTally(numel, max_votes=4)
        for words in arriving:
            tally.add(words)
        votes = tally.decide()
    """

    def __init__(self, numel: SupportsIndex, max_votes: SupportsIndex, ternary: bool = False) -> None:
        op = "VoteTally"
        self.numel = to_numel(op, numel)
        self.max_votes = to_integer(op, "max_votes", max_votes, 1, _MAX_VOTES)
        self.ternary = ternary
        self.num_votes = 0
        # A ternary vote counts as two binary ones: for the same sign, or, if it abstains, for one sign each. So a count
        # is num_votes + lead.
        self._counted_per_vote = 2 if ternary else 1
        num_planes = (self._counted_per_vote * self.max_votes).bit_length()
        self._planes = np.zeros((num_planes, words_for(self.numel)), np.uint32)
        self._like: Array | None = None

    @property
    def planes(self) -> NDArray[np.uint32]:
        """Row ``j`` holds bit ``j`` of all counts, as words; higher bits than these are 0.

        A count is that of positive votes; with ``ternary``, ``num_votes`` plus the lead of the positive over the
        negative ones.
        """
        return self._planes[: max(1, self._num_counted.bit_length())]

    @property
    def _num_counted(self) -> int:
        return self._counted_per_vote * self.num_votes

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
            words: ``num_words(numel)`` words, with ``ternary`` ``(2, num_words(numel))``, NumPy arrays or CPU tensors
                like those before. Unused bits may be set.
            weight: 1 or more.
            implementation, num_threads: As in :func:`signvote.pack_signs`.

        Raises:
            TypeError: ``words`` has another type or dtype, or ``weight`` is not an integer.
            ValueError: ``words`` has another shape or is not contiguous (its planes may lie apart), or there would be
                more than ``max_votes``. Nothing is counted then.
        """
        op = "VoteTally.add"
        self._check_kind(op, "words", words)
        source = input_words(op, "words", words)
        votes = to_integer(op, "weight", weight, 1, _MAX_VOTES)
        planes = self._planes_for(op, "weight", votes)
        add = _core.tally_add_ternary if self.ternary else _core.tally_add
        add(planes, source, votes, *choices(implementation, num_threads))
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
            ValueError: It has another ``numel``, is ternary where this one is not or the other way round, is this tally
                itself, or there would be more than ``max_votes``. Nothing is added then.
        """
        op = "VoteTally.merge"
        if not isinstance(other, VoteTally):
            raise TypeError(f"{op}: other is a {type(other).__name__}, expected a VoteTally")
        if other is self:
            raise ValueError(f"{op}: other is this tally itself, expected another one")
        if other.numel != self.numel:
            raise ValueError(f"{op}: other has {other.numel} coordinates, expected {self.numel}")
        if other.ternary != self.ternary:
            raise ValueError(f"{op}: other has ternary {other.ternary}, expected {self.ternary}")
        if other.num_votes == 0:
            return
        self._check_kind(op, "other", other._like)
        planes = self._planes_for(op, "other", other.num_votes)
        _core.tally_merge(planes, other.planes, *choices(implementation, num_threads))
        self.num_votes += other.num_votes
        self._like = other._like

    def clear(self) -> None:
        """Back to no votes, in the same memory."""
        self._planes[: self._num_counted.bit_length()].fill(0)
        self.num_votes = 0

    def counts(self) -> Array:
        """How many of the ``num_votes`` votes were positive, per coordinate: int32, tensor or array like the votes.

        With ``ternary``, the lead instead: how many more were positive than negative.
        """
        counts = np.empty(self.numel, np.int32)
        _core.tally_counts(self.planes, self.numel, counts)
        if self.ternary:
            counts -= np.int32(self.num_votes)
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
        as the planes sign (1 where this is positive) and active (1 where it is not 0); of votes of weight 1 with
        ``ternary`` that is ``majority_vote_ternary(stack, quorum=quorum, numel=numel)``.

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
            _core.tally_decide(self.planes, self._num_counted, self.numel, ties, seed, words, *chosen)
        else:
            result, words = words_out(op, self._like, (2, width), out)
            lead = self._counted_lead(op, quorum)
            _core.tally_decide_ternary(self.planes, self._num_counted, lead, self.numel, 0, words, *chosen)
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
        return _core.tally_decide(self.planes, self._num_counted, runs, ties, seed, words, *chosen)

    def decide_ternary_runs(
        self,
        runs: NDArray[np.int64],
        out: torch.Tensor,
        *,
        stride: int,
        quorum: int = 1,
        implementation: str | None = None,
        num_threads: SupportsIndex | None = None,
    ) -> int:
        """Of votes that are messages: :func:`signvote.runs.vote_ternary_runs`. Returns how many coordinates are 0."""
        op = "VoteTally.decide_ternary_runs"
        words = written_words(op, "out", out)
        lead = self._counted_lead(op, quorum)
        chosen = choices(implementation, num_threads)
        return _core.tally_decide_ternary(self.planes, self._num_counted, lead, runs, stride, words, *chosen)

    def _counted_lead(self, op: str, quorum: SupportsIndex) -> int:
        return self._counted_per_vote * to_integer(op, "quorum", quorum, 1, 2**63 - 1)

    def _check_kind(self, op: str, name: str, votes: object) -> None:
        if self._like is not None:
            check_same_kind(op, name, votes, self._like)

    def _planes_for(self, op: str, name: str, votes: int) -> NDArray[np.uint32]:
        """The planes that the counts need after this many more votes."""
        total = self.num_votes + votes
        if total > self.max_votes:
            left = self.max_votes - self.num_votes
            raise ValueError(f"{op}: {name} is {votes} votes, expected at most {left} more of {self.max_votes}")
        return self._planes[: (self._counted_per_vote * total).bit_length()]
