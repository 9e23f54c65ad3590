"""Majority vote as a communication hook of DistributedDataParallel."""

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
