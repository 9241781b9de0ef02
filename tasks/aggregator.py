"""The base class of aggregators, and the mean that rules comparing whole updates reduce to.

An aggregator is frozen. It gets the updates block by block and holds at most one block of each. An
aggregator that compares whole updates asks for a survey first.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedpool.errors import RoundError
from fedpool.tasks.geometry import Geometry
from fedpool.tasks.mean import weighted_mean
from fedpool.tasks.strategy import State, Update, relative_weights


class Aggregator(ABC):
    """Combines the updates of a round into one."""

    surveys: ClassVar[bool] = False
    """Whether to call `survey` before the first block."""

    @property
    def fewest(self) -> int:
        """The smallest number of updates that it works with."""
        return 1

    def survey(self, geometry: Geometry) -> "Aggregator":
        """The aggregator for one round, given the geometry of its updates."""
        return self

    @abstractmethod
    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        """One block of the aggregate.

        Args:
            name: of the parameter.
            state: with the global model's block.
            updates: in sorted site order.
        """

    def check(self, num_updates: int) -> None:
        """Raise `RoundError` if a round has too few updates."""
        if num_updates < self.fewest:
            raise RoundError(f"the aggregator needs {self.fewest} updates with a weight above 0, but has {num_updates}")


@dataclass(frozen=True)
class RoundMean(Aggregator):
    """The mean of one round's updates, with the weights and scales that a survey found."""

    weights: Mapping[str, float] | None = None
    """key of an update (see `Update`) -> weight; None: the update's own."""
    scales: Mapping[str, float] | None = None
    """key of an update -> factor on its difference to the global model, if it isn't 1."""

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        weighted = zip(self._weights(updates), updates, strict=True)
        used = [(weight, update) for weight, update in weighted if weight > 0]  # the others don't have to be read
        return weighted_mean((weight, self._value(name, state, update)) for weight, update in used)

    def _weights(self, updates: Sequence[Update]) -> Sequence[float]:
        given = self.weights
        return relative_weights(updates) if given is None else [given.get(update.key, 0.0) for update in updates]

    def _value(self, name: str, state: State, update: Update) -> torch.Tensor:
        scale = 1.0 if self.scales is None else self.scales.get(update.key, 1.0)
        value = update.params[name]
        return value if scale == 1.0 else torch.lerp(state.params[name], value, scale)


def stacked(name: str, updates: Sequence[Update]) -> torch.Tensor:
    """One block of all updates, (n, elements)."""
    return torch.stack([update.params[name] for update in updates])
