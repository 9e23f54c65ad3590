"""Training by majority vote: one bit per gradient coordinate in each direction."""

from signvote.cuda import cuda_available
from signvote.implementation import implementations
from signvote.ops import (
    has_nonfinite,
    majority_vote,
    majority_vote_ternary,
    num_words,
    pack_signs,
    pack_ternary,
    unpack_signs,
    unpack_ternary,
)
from signvote.tally import VoteTally

__version__ = "0.1.0"

__all__ = [
    "VoteTally",
    "__version__",
    "cuda_available",
    "has_nonfinite",
    "implementations",
    "majority_vote",
    "majority_vote_ternary",
    "num_words",
    "pack_signs",
    "pack_ternary",
    "unpack_signs",
    "unpack_ternary",
]
