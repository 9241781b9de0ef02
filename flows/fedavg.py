"""Federated averaging: sites train from the global model, and the next one is the mean of theirs.

The n_k are the sites' local steps (`NUM_STEPS_CURRENT_ROUND`) times their `aggregation_weights`,
and n is their sum.

Paper:
    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", algorithm 1 (https://arxiv.org/abs/1602.05629)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedpool.flows.averaging import Averaging, AveragingRecipe
from fedpool.tasks.aggregator import Aggregator
from fedpool.tasks.aggregators import Mean
from fedpool.tasks.strategy import State, Update


@dataclass(frozen=True)
class FedAvg(Averaging):
    """w <- sum_k (n_k / n) w_k

    With an aggregator other than the mean, w is the aggregate of the w_k. The only state is the
    global model.
    """

    rule: Aggregator = field(default_factory=Mean)

    def apply(self, state: State, updates: Sequence[Update]) -> State:
        params = {name: self.rule.combine(name, state, updates) for name in state.params}
        return state.after(params)


class FedAvgRecipe(AveragingRecipe):
    """Federated averaging, the baseline: start here.

    Sites train alone between rounds, so little data is transferred. If their data differ much, long
    local training pulls the model apart: try FedProx, SCAFFOLD or FedOpt.

    Client script: examples/algorithms/plain.py
        Your training loop between `receive()` and `send()`.

            received = flare.receive()
            model.load_state_dict(received.params)
            flare.send(flare.FLModel(params=model.state_dict(), metrics=metrics))

        With `meta={"NUM_STEPS_CURRENT_ROUND": steps}`, the site's model is weighted by its steps.
        Without it, all sites count equally.

    Raises:
        RecipeError (also a pydantic.ValidationError): a field is invalid; says which, its value and
            the remedy.
    """

    def strategy(self, num_sites: int) -> FedAvg:
        return FedAvg(self.rule)
