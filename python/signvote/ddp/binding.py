"""Which ranks a state speaks with: the process group it was given, its channel, and whether a vote has failed there."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from signvote.ddp.channel import Channel
from signvote.ddp.stats import Traffic


class Binding:
    """Binds to the process group when it is first needed, and anew when the group was destroyed and made again.

    Args:
        backend: As :class:`signvote.ddp.channel.Channel`.
        is_group_missing: Whether ``process_group`` must be set before use: it was not pickled with the state.

    Attributes:
        process_group: None: that of all ranks, found when it is needed.
        timeout: How long a rank waits for another; None: as long as ``process_group`` says.
        traffic: What has gone over all channels.
        failure: Why no vote on the current group can be trusted any more; None as long as all are well.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        timeout: timedelta | None,
        backend: str,
        *,
        is_group_missing: bool = False,
    ) -> None:
        self.process_group = None if process_group is dist.group.WORLD else process_group
        self.timeout = timeout
        self._backend = backend
        self.traffic = Traffic()
        self.failure: str | None = None
        self._is_group_missing = is_group_missing
        self._channel: Channel | None = None

    @property
    def channel(self) -> Channel | None:
        """None unless there is one whose group is alive."""
        return self._channel if self._channel is not None and self._channel.alive else None

    def bind(self) -> Channel:
        """Make a channel; all ranks do.

        Raises:
            RuntimeError: If there is no process group, or torch makes no other one of its ranks.
        """
        self.check_process_group()
        self.failure = None
        try:
            self._channel = Channel(self.process_group, self.timeout, self.traffic, self._backend)
        except Exception as error:
            raise RuntimeError(f"signvote: rank {dist.get_rank(self.process_group)}: new group: {error}") from error
        return self._channel

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def fail(self, message: str) -> None:
        """Ranks may be out of step from here on: every later vote on this group raises this.

        Only the text is kept: an exception would keep alive what its traceback refers to, the group above all.
        """
        if self.failure is None:
            self.failure = message

    def check_process_group(self) -> None:
        if not dist.is_initialized():
            raise RuntimeError("signvote: torch.distributed is not initialised (init_process_group)")
        if self._is_group_missing and self.process_group is None:
            raise RuntimeError(
                "signvote: this state was pickled with a process group of its own: set state.process_group before use"
            )
        if self.process_group is not None:
            try:
                dist.get_process_group_ranks(self.process_group)
            except (KeyError, ValueError):
                raise RuntimeError("signvote: the state's process group was destroyed") from None

    @property
    def has_group(self) -> bool:
        """Whether there is a group of the state's own, or was when it was pickled."""
        return self.process_group is not None or self._is_group_missing

    def rank_and_world_size(self, caller: str) -> tuple[int, int]:
        try:
            self.check_process_group()
        except RuntimeError as error:
            raise RuntimeError(f"{caller}: this rank is not known: {error}") from None
        return dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
