"""The parameters of a state's model: where each has its place, what it is called, which of them are voted on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from signvote.ddp.exclude import Exclude, resolve


class Parameters:
    """The parameters of one model, known by name once somebody tells, otherwise in the order in which DDP shows them.

    Args:
        exclude: Those of which the mean is taken, see :func:`signvote.ddp.exclude.resolve`.
        names: Of a state that was unpickled: the names that are to be told again.

    Attributes:
        names: In the order of the model, None if nobody has told them.
        excluded: Places of the parameters of which the mean is taken.
    """

    def __init__(self, exclude: Exclude, names: list[str] | None = None) -> None:
        self.names = names
        self.excluded: frozenset[int] = frozenset()
        self._exclude = exclude
        self._places: dict[torch.Tensor, int] = {}

    def tell(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """As :meth:`signvote.ddp.MajorityVoteState.name_parameters`."""
        if self._places:
            raise RuntimeError("name_parameters: the parameters are known already: call it before the first backward")
        named = list(named_parameters)
        names = [name for name, _ in named]
        if self.names is not None and self.names != names:
            raise ValueError(f"name_parameters: names: expected those of the saved state, {self.names}, got {names}")
        excluded = set(resolve(self._exclude, named))
        self.names = names
        self._places = {parameter: place for place, (_, parameter) in enumerate(named)}
        self.excluded = frozenset(place for place, name in enumerate(names) if name in excluded)

    def places(self, parameters: Sequence[torch.Tensor]) -> list[int]:
        """The index of each in the model."""
        if self._exclude is not None and self.names is None:
            raise RuntimeError(
                "majority_vote_hook: exclude needs the parameters' names: use attach(ddp), or name_parameters()"
            )
        return [self._place(parameter) for parameter in parameters]

    def _place(self, parameter: torch.Tensor) -> int:
        if self.names is None:
            return self._places.setdefault(parameter, len(self._places))
        if parameter not in self._places:
            raise RuntimeError(
                f"majority_vote_hook: a parameter of shape {tuple(parameter.shape)} is not among those that were "
                "named: a state belongs to one model; after unpickling, attach(ddp, state=state) names them anew"
            )
        return self._places[parameter]

    def voted(self) -> list[torch.Tensor]:
        """Those that are not excluded, as far as they are known."""
        return [parameter for parameter, place in self._places.items() if place not in self.excluded]

    def shapes(self) -> dict[str, torch.Size]:
        """By name."""
        names = self.known_names("shapes")
        return {names[place]: parameter.shape for parameter, place in self._places.items()}

    def known_names(self, caller: str) -> list[str]:
        if self.names is None:
            raise RuntimeError(
                f"{caller}: the parameters' names are not known: use attach(ddp), or name_parameters() before training"
            )
        return self.names

    def exclude_to_save(self) -> Exclude:
        """Names, if they are known: functions cannot always be pickled, and could select others elsewhere."""
        if self.names is None or not self._places:
            return self._exclude
        return [name for place, name in enumerate(self.names) if place in self.excluded] or None
