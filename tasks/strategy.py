"""What a strategy is: two pure functions on frozen state, after fedjax's `FederatedAlgorithm`.

Legend: a *slice* is part of a model, a mapping of parameter names to flat float64 tensors (one block of a parameter each;
integers as differences to a common origin, booleans as 0 and 1).
A strategy is given slice after slice of the model, never the whole, so memory does not grow with model or number of sites.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Slice = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class State:
    """What a strategy carries from round to round: the global model, as a slice."""

    params: Slice


@dataclass(frozen=True, slots=True)
class Update:
    """One accepted update, as a slice.

    Attributes:
        site: who sent it.
        weight: from 0, finite, relative to the other updates'.
        params: the site's parameters (a DIFF has been added to the global model); read when asked for.
    """

    site: str
    weight: float
    params: Slice


class Strategy(Protocol):
    """How updates become the next global model.

    Laws, which the tests hold every strategy to that averages: weights are relative; one site with any weight gives that
    site's model; splitting a site in two changes nothing; same inputs, same bits.
    """

    def init(self, params: Slice) -> State:
        """The state that the first round starts from."""
        ...

    def apply(self, state: State, updates: Sequence[Update]) -> tuple[Slice, State]:
        """The next global model and state.

        Args:
            state: of the round before.
            updates: in sorted site order, at least one with a weight above 0.
        """
        ...
