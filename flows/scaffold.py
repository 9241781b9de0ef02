"""SCAFFOLD: control variates correct the drift of each site's gradient.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", algorithm 1, option II
(https://arxiv.org/abs/1910.06378). The server's variate c travels with the global model; a site keeps its own c_i, adds c - c_i
to each gradient g of its S local steps, and sends what its c_i changed by.

    y <- y - lr_k (g(y) + c - c_i), from y = x
    c_i <- c_i - c + (x - y) / (S lr_k)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import Field

from fedpool.model import ALGORITHM, CONTROL, SCAFFOLD
from fedpool.recipe import Recipe
from fedpool.tasks.mean import weighted_mean
from fedpool.tasks.strategy import Slice, State, Strategy, Update


@dataclass(frozen=True)
class Scaffold(Strategy):
    """x <- x + lr (mean of the sites' y - x); c <- c + n / N (mean of the changes of their c_i)

    n of the job's N sites take part in the round. The mean of the parameters is by the weights, which the paper has equal; that
    of the variates is not.
    """

    num_sites: int
    lr: float = 1.0

    extras = (CONTROL,)
    shared = True

    @property
    def slots(self) -> Mapping[str, float]:
        """See `Strategy.slots`."""
        return {CONTROL: 0.0}

    def apply(self, state: State, updates: Sequence[Update]) -> tuple[Slice, State]:
        """See `Strategy.apply`."""
        params: dict[str, torch.Tensor] = {}
        control: dict[str, torch.Tensor] = {}
        share = len(updates) / self.num_sites
        for name in state.params:
            mean = weighted_mean((update.weight, update.params[name]) for update in updates)
            if name in state.averaged:
                params[name] = mean
                continue
            params[name] = mean if self.lr == 1 else state.params[name].lerp(mean, self.lr)
            changes = weighted_mean((1.0, update.extras[CONTROL][name]) for update in updates)
            control[name] = state.slots[CONTROL][name] + share * changes
        return params, replace(state, params=params, slots={CONTROL: control}, round=state.round + 1)


class ScaffoldRecipe(Recipe):
    """Federated learning for sites that differ much and train long between rounds, at twice the transfer of averaging.

    Every site should take part often: a control variate that is many rounds old corrects little.

    Client script, as in examples/algorithms/scaffold.py:
        A helper corrects the steps of the optimizer, SGD; a patched Lightning or Hugging Face trainer has it built in.

            control = flare.Scaffold(model, optimizer)  # corrects the optimizer's steps from here on
            flare.send(flare.FLModel(params=model.state_dict(), metrics=metrics, extras=control.extras()))
    """

    entrypoint: ClassVar[str] = "fedpool.flows.entrypoints.scaffold"

    server_lr: float = Field(1.0, description="learning rate of the server", gt=0, allow_inf_nan=False)

    @property
    def client_config(self) -> Mapping[str, Any]:
        """See `Recipe.client_config`."""
        return {ALGORITHM: SCAFFOLD}

    def strategy(self, num_sites: int) -> Scaffold:
        """See `Recipe.strategy`."""
        return Scaffold(num_sites, self.server_lr)
