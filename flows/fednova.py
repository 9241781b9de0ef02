"""FedNova: averages the sites' differences per local step, so more steps don't mean more influence.

Paper:
    Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization", equation 6 (https://arxiv.org/abs/2007.07481)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedpool.flows.late_updates import NoLateUpdates
from fedpool.model import ALGORITHM, FEDNOVA, LOCAL_STEPS
from fedpool.tasks.mean import weighted_mean
from fedpool.tasks.strategy import State, Strategy, Update, relative_weights


@dataclass(frozen=True)
class FedNova(Strategy):
    """w <- w + tau_eff sum_k p_k (w_k - w) / tau_k, where tau_eff = sum_k p_k tau_k

    p_k are the weights and tau_k = `meta["LOCAL_STEPS"]` the local steps of the sites: for plain
    SGD their number, for any other local optimizer the L1 norm of the weights that its update gives
    to the gradients. If groups of parameters differ in that, tau_k is their mean. With equal steps,
    this is federated averaging. A site that took no step has weight 0.
    """

    positive_meta = (LOCAL_STEPS,)

    def apply(self, state: State, updates: Sequence[Update]) -> State:
        steps = {update.site: _steps(update) for update in updates}
        weights = relative_weights(updates)

        def mean(values: Iterable[torch.Tensor]) -> torch.Tensor:
            return weighted_mean(zip(weights, values, strict=True))

        effective = float(mean(_scalar(steps[update.site]) for update in updates))
        params = {}
        for name, before in state.params.items():
            if name in state.averaged:
                params[name] = mean(update.params[name] for update in updates)
                continue
            params[name] = mean(before.lerp(update.params[name], effective / steps[update.site]) for update in updates)
        return state.after(params)


def _steps(update: Update) -> float:
    value = update.meta[LOCAL_STEPS]
    assert isinstance(value, int | float), "the gate checks this"
    return float(value)


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


class FedNovaRecipe(NoLateUpdates):
    """Federated averaging for sites that take unequal numbers of local steps.

    Their data, epochs or speed may differ.

    Client script: examples/algorithms/fednova.py
        It reports its number of steps. As its weight, use its number of rows, which doesn't depend
        on the steps. A patched Lightning or Hugging Face trainer does both automatically. The
        optimizer is SGD, optionally with momentum or a schedule.

            steps = flare.LocalSteps(optimizer)
            meta = {"NUM_STEPS_CURRENT_ROUND": len(digits.labels), "LOCAL_STEPS": steps.count}
            flare.send(flare.FLModel(params=model.state_dict(), metrics=metrics, meta=meta))
    """

    @property
    def client_config(self) -> Mapping[str, Any]:
        return {ALGORITHM: FEDNOVA}

    def strategy(self, num_sites: int) -> FedNova:
        return FedNova()
