"""Before ranks vote, they make sure that they mean the same thing.

Ranks that disagree on an option or a size would hang in a collective, or worse, vote on different coordinates in
silence. So each describes itself, and all raise the same error if any differs. Descriptions travel as JSON bytes in a
tensor: nothing that comes from the network is unpickled.
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch

from signvote.ddp.channel import Channel

#: Raised whenever the words, the layout or the trailer of a message change their meaning, or the way that it takes.
WIRE_VERSION = 3

_MAX_DESCRIPTION_BYTES = 1 << 16


class DisagreementError(RuntimeError):
    """Ranks differ in something they must have in common. The message is the same on every rank."""


def check_agreement(channel: Channel, subject: str, description: Mapping[str, Any]) -> None:
    """Compare ``description`` over all ranks of ``channel``; collective.

    Raises:
        DisagreementError: On every rank, naming each field that differs and which ranks hold which value.
    """
    own = json.dumps(dict(description)).encode()
    lengths = torch.zeros(channel.size, 1, dtype=torch.int64)
    channel.all_gather(lengths, torch.tensor([len(own)], dtype=torch.int64))
    longest = int(lengths.max())
    if longest > _MAX_DESCRIPTION_BYTES:
        raise DisagreementError(f"{subject}: a rank announces a description of {longest} bytes; is it signvote?")
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    gathered = torch.zeros(channel.size, longest, dtype=torch.uint8)
    channel.all_gather(gathered, padded)
    descriptions = [
        json.loads(row[: int(length)].numpy().tobytes()) for row, length in zip(gathered, lengths, strict=True)
    ]

    fields = list(dict.fromkeys(field for one in descriptions for field in one))
    differences = [text for field in fields if (text := _difference(field, descriptions))]
    if differences:
        raise DisagreementError(f"{subject}: ranks disagree on {'; on '.join(differences)}")


def short_list(numbers: Sequence[int]) -> str:
    """For a description: ``numbers`` if they are few, otherwise a digest of them."""
    text = ", ".join(map(str, numbers))
    return text if len(text) <= 200 else f"{len(numbers)} of SHA-256 {sha256(text.encode()).hexdigest()}"


def _difference(field: str, descriptions: list[dict[str, Any]]) -> str | None:
    ranks_by_value: dict[str, list[int]] = {}
    for rank, description in enumerate(descriptions):
        value = json.dumps(description[field]) if field in description else "nothing"
        ranks_by_value.setdefault(value, []).append(rank)
    if len(ranks_by_value) == 1:
        return None
    return f"{field}: " + ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in ranks_by_value.items())


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"
