"""What recipes have in common that train nothing: the fields that only a training needs are fixed, and no form shows them."""

from typing import Annotated, Literal

from pydantic import Field

from fedpool.flows.fedavg import FedAvg
from fedpool.recipe import Recipe


class EvaluationRecipe(Recipe):
    """Base of the recipes without training: sites score `model`, by the task `evaluate`.

    `min_clients` counts the sites that answer: with fewer, the job fails.
    """

    # A field that is excluded is no part of the job's description, nor of a deployment's form.
    num_rounds: Literal[0] = Field(default=0, exclude=True)
    clients_per_round: None = Field(default=None, exclude=True)
    over_sample: Literal[0] = Field(default=0, exclude=True)
    params_transfer_type: Literal["FULL"] = Field(default="FULL", exclude=True)
    aggregation_weights: Annotated[dict[str, float], Field(max_length=0)] = Field(default_factory=dict, exclude=True)
    exclude_vars: tuple[()] = Field(default=(), exclude=True)
    final_evaluation: Literal[True] = Field(default=True, exclude=True)
    stop_cond: None = Field(default=None, exclude=True)
    patience: None = Field(default=None, exclude=True)
    max_update_norm: None = Field(default=None, exclude=True)
    clip_updates: Literal[False] = Field(default=False, exclude=True)
    max_rejections: None = Field(default=None, exclude=True)

    def strategy(self, num_sites: int) -> FedAvg:
        """See `Recipe.strategy`: the plain mean, which is never taken, because nobody trains."""
        return FedAvg()
