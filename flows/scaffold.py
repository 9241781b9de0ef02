"""SCAFFOLD: control variates correct the drift of each site's gradient.

The server's variate c travels with the global model. Each site keeps its own c_i, adds c - c_i to
each gradient g of its S local steps, and sends the change of its c_i.

    y <- y - lr_k (g(y) + c - c_i), from y = x
    c_i <- c_i - c + (x - y) / (S lr_k)

Paper:
    Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
    algorithm 1, option II (https://arxiv.org/abs/1910.06378)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field

from fedpool.flows.late_updates import NoLateUpdates
from fedpool.model import ALGORITHM, CONTROL, SCAFFOLD
from fedpool.tasks.mean import weighted_mean
from fedpool.tasks.strategy import Shares, State, Strategy, Update, relative_weights

Weighted = bool | Literal["model"]


@dataclass(frozen=True)
class Scaffold(Strategy):
    """x <- x + lr sum_k (w_k / w) (y_k - x); c <- sum_k (w_k / W) c_k

    The first sum is over the sites whose updates count in the round, with total weight w. The
    second is over all sites of the job, with total weight W, so c stays the mean of the sites'
    variates, whichever sites take part. The paper has equal weights, as with `weighted=False`. A
    site's weight in W is that of its first update that counted. A site without one weighs as much
    as the others on average. If `clip_updates` scales down y_k - x, the change of c_k is scaled
    down by the same factor.
    """

    num_sites: int
    lr: float = 1.0
    weighted: Weighted = True

    extras = (CONTROL,)
    shared = True

    @property
    def slots(self) -> Mapping[str, float]:
        return {CONTROL: 0.0}

    def apply(self, state: State, updates: Sequence[Update]) -> State:
        params: dict[str, torch.Tensor] = {}
        control: dict[str, torch.Tensor] = {}
        weights = relative_weights(updates) if self.weighted else [1.0] * len(updates)
        for name in state.params:
            mean = weighted_mean(zip(weights, (update.params[name] for update in updates), strict=True))
            if name in state.averaged:
                params[name] = mean
                continue
            params[name] = mean if self.lr == 1 else state.params[name].lerp(mean, self.lr)
            control[name] = self._control(name, state, updates)
        return state.after(params, {CONTROL: control})

    def _control(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        """The next c."""
        before = state.slots[CONTROL][name]
        if self.weighted is not True:
            changes = weighted_mean((1.0, _change(name, update)) for update in updates)
            return before + len(updates) / self.num_sites * changes
        total = Shares.total(state.shares.now, self.num_sites)
        control = before * (Shares.total(state.shares.before, self.num_sites) / total)
        for update in updates:
            control = control + state.shares.now[update.site] / total * _change(name, update)
        return control


def _change(name: str, update: Update) -> torch.Tensor:
    change = update.extras[CONTROL][name]
    return change if update.scale == 1.0 else change * update.scale


class ScaffoldRecipe(NoLateUpdates):
    """Federated learning for sites that differ much and train long between rounds.

    Transfers twice as much as averaging. Every site should take part often: a control variate that
    is many rounds old corrects little.

    Client script: examples/algorithms/scaffold.py
        A helper corrects the steps of the optimizer, SGD, and keeps the site's variate. A patched
        Lightning or Hugging Face trainer has it built in.

            control = flare.Scaffold(model, optimizer)  # corrects the optimizer's steps
            params, extras = model.state_dict(), control.extras()
            flare.send(flare.FLModel(params=params, metrics=metrics, extras=extras))
    """

    server_lr: float = Field(default=1.0, description="the server's learning rate", gt=0, allow_inf_nan=False)

    weighted: Weighted = Field(
        default=True,
        description="true: sites count by their weights, in the model and in the control variates; false: equally, as in the "
        "paper; model: by their weights in the model only, as in earlier versions",
    )

    @classmethod
    def earlier(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**super().earlier(fields), "weighted": "model"}

    @property
    def client_config(self) -> Mapping[str, Any]:
        return {ALGORITHM: SCAFFOLD}

    def strategy(self, num_sites: int) -> Scaffold:
        return Scaffold(num_sites, self.server_lr, self.weighted)
