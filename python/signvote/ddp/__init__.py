"""Majority vote as a communication hook of DistributedDataParallel.

Each line uses those above it:

- ``options``, ``stats``, ``layout`` (where each coordinate travels), ``trailer``, ``numbers`` (what travels with it);
- ``channel`` (a group and a thread of our own), ``topology`` (who sends what to whom), ``voter``, ``cuda_voter`` (what
  becomes of it);
- ``ballot`` (what a rank votes), ``codec`` (from a bucket to a message and back), ``cpu_codec``, ``cuda_codec``;
- ``parameters`` and ``exclude``, ``binding``, ``momentum``, ``checkpoint``, ``agreement``, ``agreement_rates``,
  ``hybrid`` and ``switching``, ``advice``: one concern of a state each;
- ``plan`` (all that the votes of one bucket have in common), ``state``, ``hook``.
"""

from signvote.ddp.advice import AdviceWarning
from signvote.ddp.agreement import WIRE_VERSION
from signvote.ddp.hook import attach, majority_vote_hook
from signvote.ddp.hybrid import CalibratedSwitch
from signvote.ddp.state import MajorityVoteState
from signvote.ddp.stats import ParameterStats, VoteStats

__all__ = [
    "WIRE_VERSION",
    "AdviceWarning",
    "CalibratedSwitch",
    "MajorityVoteState",
    "ParameterStats",
    "VoteStats",
    "attach",
    "majority_vote_hook",
]
