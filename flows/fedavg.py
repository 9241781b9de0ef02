"""Federated averaging.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1
(https://arxiv.org/abs/1602.05629). Each site trains from the global model; the next one is the mean of theirs, weighted by
their local steps (`NUM_STEPS_CURRENT_ROUND`) and by `aggregation_weights`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedpool.flows.averaging import AveragingRecipe
from fedpool.tasks.aggregators import Aggregator, Mean
from fedpool.tasks.geometry import Geometry
from fedpool.tasks.strategy import Slice, State, Strategy, Update


@dataclass(frozen=True)
class FedAvg(Strategy):
    """w <- sum_k (n_k / n) w_k. The state is the global model alone."""

    rule: Aggregator = field(default_factory=Mean)

    @property
    def surveys(self) -> bool:
        """See `Strategy.surveys`."""
        return self.rule.surveys

    def survey(self, geometry: Geometry) -> "FedAvg":
        """See `Strategy.survey`."""
        return replace(self, rule=self.rule.survey(geometry))

    def apply(self, state: State, updates: Sequence[Update]) -> tuple[Slice, State]:
        """See `Strategy.apply`."""
        params = {name: self.rule.combine(name, state, updates) for name in state.params}
        return params, replace(state, params=params, round=state.round + 1)


class FedAvgRecipe(AveragingRecipe):
    """Federated averaging, the baseline: start here.

    Raises:
        pydantic.ValidationError (a ValueError): a field that cannot work, with its name, its value and the remedy.
    """

    entrypoint: ClassVar[str] = "fedpool.flows.entrypoints.fedavg"

    def strategy(self, num_sites: int) -> Strategy:
        """See `Recipe.strategy`."""
        return FedAvg(self.rule)
