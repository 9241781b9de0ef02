"""The base class of recipes without training, in which the fields about training are constants."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

from fedpool.flows.fedavg import FedAvg
from fedpool.recipe import Recipe


class EvaluationRecipe(Recipe):
    """Base of the recipes without training: sites score `model` with the task `evaluate`.

    `min_clients` counts the sites that answer. With fewer, the job fails.
    """

    num_rounds: ClassVar[Literal[0]] = 0
    clients_per_round: ClassVar[None] = None
    over_sample: ClassVar[Literal[0]] = 0
    sample_size: ClassVar[None] = None
    params_transfer_type: ClassVar[Literal["FULL"]] = "FULL"
    aggregation_weights: ClassVar[Mapping[str, float]] = MappingProxyType({})
    exclude_vars: ClassVar[tuple[()]] = ()
    stop_cond: ClassVar[None] = None
    stop_condition: ClassVar[None] = None
    patience: ClassVar[None] = None
    max_update_norm: ClassVar[None] = None
    clip_updates: ClassVar[Literal[False]] = False
    max_rejections: ClassVar[None] = None
    final_evaluation: ClassVar[Literal[True]] = True

    def strategy(self, num_sites: int) -> FedAvg:
        """See `Recipe.strategy`: the plain mean, never computed because no site trains."""
        return FedAvg()
