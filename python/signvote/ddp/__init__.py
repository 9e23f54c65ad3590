"""Majority vote as a communication hook of DistributedDataParallel."""

from signvote.ddp.agreement import WIRE_VERSION
from signvote.ddp.hook import attach, majority_vote_hook
from signvote.ddp.state import MajorityVoteState
from signvote.ddp.stats import VoteStats

__all__ = [
    "WIRE_VERSION",
    "MajorityVoteState",
    "VoteStats",
    "attach",
    "majority_vote_hook",
]
