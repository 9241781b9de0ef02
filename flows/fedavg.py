"""Federated averaging: the recipe and its strategy.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1
(https://arxiv.org/abs/1602.05629). Each site trains from the global model; the next one is the mean of theirs, weighted by
their local steps (`NUM_STEPS_CURRENT_ROUND`) and by `aggregation_weights`.
"""

from collections.abc import Sequence
from typing import ClassVar

from fedpool.recipe import Recipe
from fedpool.tasks.mean import weighted_mean
from fedpool.tasks.strategy import Slice, State, Strategy, Update


class FedAvg:
    """w <- sum_k (n_k / n) w_k. The state is the global model alone."""

    def init(self, params: Slice) -> State:
        """See `Strategy.init`."""
        return State(params)

    def apply(self, state: State, updates: Sequence[Update]) -> tuple[Slice, State]:
        """See `Strategy.apply`."""
        params = {
            name: weighted_mean((update.weight, update.params[name]) for update in updates) for name in state.params
        }
        return params, State(params)


class FedAvgRecipe(Recipe):
    """Federated averaging, the baseline: start here.

    Raises:
        pydantic.ValidationError (a ValueError): a field that cannot work, with its name, its value and the remedy.
    """

    entrypoint: ClassVar[str] = "fedpool.flows.entrypoints.fedavg"

    def strategy(self) -> Strategy:
        """See `Recipe.strategy`."""
        return FedAvg()
