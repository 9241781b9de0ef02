"""FedProx: federated averaging with sites held near the global model.

A site adds a proximal term to its loss. The server does federated averaging.

    F_k(w) + mu/2 ||w - w_global||^2

Paper:
    Li et al. 2020, "Federated Optimization in Heterogeneous Networks", algorithm 2
    (https://arxiv.org/abs/1812.06127)
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from fedpool.flows.fedavg import FedAvgRecipe
from fedpool.model import FEDPROX_MU


class FedProxRecipe(FedAvgRecipe):
    """Federated averaging for sites that differ much or do unequal amounts of work.

    A proximal term pulls each site back to the global model.

    Client script: examples/algorithms/fedprox.py
        The term is one line of the loss. A patched Lightning or Hugging Face trainer adds its
        gradient automatically.

            mu = flare.get_config()["fedprox_mu"]
            loss = loss + flare.prox_loss(model, received.params, mu)
    """

    fedprox_mu: float = Field(
        description="weight of the proximal term; the paper tries 0.001 to 1", ge=0, allow_inf_nan=False
    )

    @property
    def client_config(self) -> Mapping[str, Any]:
        return {FEDPROX_MU: self.fedprox_mu}
