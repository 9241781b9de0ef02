"""Ditto: a global model by federated averaging, and a personal model at each site that never leaves
it.

In addition to its part in the global model, a site minimises this for its personal v:

    F_k(v) + lambda/2 ||v - w_global||^2

The paper starts every v from the initial model, even at a site that is first drawn in a later
round. With `personal_start="received"`, v starts from the first model that the site receives, which
other sites have already trained.

Paper:
    Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization", algorithm 1
    (https://arxiv.org/abs/2012.04221)
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from fedpool.flows.fedavg import FedAvgRecipe


class DittoRecipe(FedAvgRecipe):
    """Personalisation: each site has its own model, and `ditto_lambda` pulls it to the global one.

    Client script: examples/algorithms/ditto.py
        It trains two models, and keeps the personal one at the site from round to round.

            strength = flare.get_config()["ditto_lambda"]
            personal.load_state_dict(flare.kept("personal", initial=True))
            (loss + flare.prox_loss(network, anchor, pull)).backward()
            flare.keep("personal", personal.state_dict())
    """

    ditto_lambda: float = Field(
        description="strength of the pull to the global model; 0: purely local; the paper tries 0.05 to 2",
        ge=0,
        allow_inf_nan=False,
    )
    personal_start: Literal["initial", "received"] = Field(
        default="initial",
        description="start of a site's personal model: the job's initial model, as in the paper, or the first model received",
    )

    @classmethod
    def earlier(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**super().earlier(fields), "personal_start": "received"}

    @property
    def starts_own_models(self) -> bool:
        return self.personal_start == "initial"

    @property
    def client_config(self) -> Mapping[str, Any]:
        return {"ditto_lambda": self.ditto_lambda}
