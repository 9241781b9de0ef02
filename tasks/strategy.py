"""Strategies: two pure functions on frozen state, like fedjax's `FederatedAlgorithm`.

Legend: a *slice* is part of a model: a mapping of parameter names to flat float64 tensors, one
block of a parameter each (integers as differences to a common origin, booleans as 0 and 1). A
*slot* is a value that a strategy keeps between rounds for each element of each trained parameter: a
momentum, a control variate. A *group of extras* is what sites send in addition to each trained
parameter. A strategy gets the model slice by slice, never the whole, so memory grows neither with
the model nor with the number of sites.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedpool.tasks.geometry import Geometry
from fedpool.tasks.sampling import choose_sites
from fedpool.tasks.staleness import update_key

Slice = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shares:
    """The weights of sites in a job rather than a round, relative to the heaviest.

    A site's weight is that of its first update that counted.

    Attributes:
        before: site -> weight, for the sites known from earlier rounds; 0 if no update of it has
            counted.
        now: the same with this round's updates.
    """

    before: Mapping[str, float] = field(default_factory=dict)
    now: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def total(weights: Mapping[str, float], num_sites: int) -> float:
        """The total weight of a job's sites; unknown ones count as the average of the others."""
        return sum(weights.values()) * (num_sites / len(weights)) if weights else 0.0


@dataclass(frozen=True, slots=True)
class State:
    """The state of a strategy between rounds.

    Attributes:
        params: the global model, as a slice.
        slots: slot -> its values, as a slice without the parameters in `averaged`.
        round: number of earlier training rounds.
        averaged: parameters that are only averaged, because they aren't trained: counters, masks,
            and the running statistics of normalisation layers.
        shares: of the sites in the job.
    """

    params: Slice
    slots: Mapping[str, Slice] = field(default_factory=dict)
    round: int = 0
    averaged: frozenset[str] = frozenset()
    shares: Shares = Shares()

    def after(self, params: Slice, slots: Mapping[str, Slice] | None = None) -> "State":
        """The state that the next round starts from.

        Args:
            params: the next global model.
            slots: the next values of the slots; None if there are none, or they stay the same.
        """
        return replace(self, params=params, slots=self.slots if slots is None else slots, round=self.round + 1)


@dataclass(frozen=True, slots=True)
class Update:
    """One accepted update, as a slice.

    Attributes:
        site: the sender.
        weight: at least 0, finite: the weight that the site reports (steps or rows), times the
            site's factor in `aggregation_weights`, times the discount of a late update (see
            `fedpool.tasks.staleness`). A sum of weights can overflow; a mean only needs their
            ratios (`relative_weights`). In jobs before `arithmetic` 3, relative to the heaviest of
            the round.
        params: the site's parameters, read on access (a DIFF has been added to the global model).
            For a late update, the global model plus the difference to the update's own base; for
            parameters that are only averaged (`State.averaged`), the site's values.
        extras: group -> the tensors that the site sent in addition to its parameters, as a slice
            like those of the state's slots.
        meta: the script's `meta` of the update.
        scale: factor by which its difference to the global model was clipped; already applied to
            `params`, but not to `extras`.
        staleness: number of commits between the model that the site trained from and the round that
            counts the update; 0 for a fresh update.
    """

    site: str
    weight: float
    params: Slice
    extras: Mapping[str, Slice] = field(default_factory=dict)
    meta: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    scale: float = 1.0
    staleness: int = 0

    @property
    def key(self) -> str:
        """Distinguishes it from the round's other updates; a site may have late ones, too."""
        return update_key(self.site, self.staleness)


class Strategy(ABC):
    """Turns updates into the next global model. Frozen.

    Laws, which the tests check for every strategy that averages: only the ratios of weights matter;
    one site with any weight gives that site's model; splitting a site in two changes nothing; same
    inputs, same bits.
    """

    extras: ClassVar[tuple[str, ...]] = ()
    """Groups of tensors that every update has in addition to its parameters."""

    positive_meta: ClassVar[tuple[str, ...]] = ()
    """Names that every update's `meta` must have, with numbers from 1e-12 to 1e12, or 0 (idle)."""

    shared: ClassVar[bool] = False
    """Whether the sites receive the slots with the global model."""

    @property
    def slots(self) -> Mapping[str, float]:
        """Slot -> the initial value of all its elements."""
        return {}

    @property
    def surveys(self) -> bool:
        """Whether it needs the geometry of all updates before the first slice."""
        return False

    def init(self, params: Slice, averaged: frozenset[str] = frozenset()) -> State:
        """The state that the first round starts from.

        Args:
            params: the initial model.
            averaged: see `State`.
        """
        slots = {
            slot: {name: torch.full_like(params[name], initial) for name in params if name not in averaged}
            for slot, initial in self.slots.items()
        }
        return State(params, slots, averaged=averaged)

    def choose(self, *, seed: int, round: int, sites: Sequence[str], count: int | None) -> tuple[str, ...]:
        """The sites that train in a round; see `choose_sites`.

        Args:
            sites: all available sites, in the job's order.
        """
        return choose_sites(seed, round, sites, count)

    def survey(self, geometry: Geometry) -> "Strategy":
        """The strategy for one round, given the geometry of its updates; called if `surveys` is
        true.

        Raises:
            RoundError: the round has too few updates.
        """
        return self

    @abstractmethod
    def apply(self, state: State, updates: Sequence[Update]) -> State:
        """The state after a round, with the next global model; see `State.after`.

        Args:
            state: of the previous round.
            updates: in site order, at least one with a weight above 0.

        Raises:
            RoundError: the strategy can't use the updates.
        """


def relative(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights relative to the heaviest, so neither their products nor their sum can overflow."""
    heaviest = max(weights.values(), default=0.0)
    return {site: weight / heaviest if heaviest else 0.0 for site, weight in weights.items()}


def relative_weights(updates: Sequence[Update]) -> list[float]:
    """The weights of updates relative to the heaviest, in their order."""
    return list(relative({update.key: update.weight for update in updates}).values())
