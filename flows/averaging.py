"""The choice of the aggregator, for recipes that average whole models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from pydantic import Field, model_validator

from fedpool.errors import RecipeError
from fedpool.flows.late_updates import LateUpdates
from fedpool.tasks.aggregator import Aggregator
from fedpool.tasks.aggregators import AGGREGATORS
from fedpool.tasks.choose_aggregator import AggregatorField, chosen, written
from fedpool.tasks.geometry import Geometry
from fedpool.tasks.own_function import OwnFunction
from fedpool.tasks.strategy import Strategy

_FLAT = ("num_byzantine", "trim_ratio", "num_selected", "clip_norm", "even_median", "weighted_median")
"""Recipe fields in which an earlier version had the parameters of all aggregators."""

_RENAMED = {"weighted_median": "weighted"}

_BEFORE_THERE_WAS_A_CHOICE: Mapping[str, dict[str, Any]] = {
    "bulyan": {"even_median": "midpoint"},
    "geometric_median": {"weighted_median": False},
}
"""Aggregator -> the value of a field for jobs from before the field existed."""


@dataclass(frozen=True)
class Averaging(Strategy):
    """A strategy that combines the updates into one with an aggregator."""

    rule: Aggregator

    @property
    def surveys(self) -> bool:
        return self.rule.surveys

    def survey(self, geometry: Geometry) -> Self:
        return replace(self, rule=self.rule.survey(geometry))


class AveragingRecipe(LateUpdates):
    """A recipe whose rounds average the sites' models with an aggregator of the user's choice."""

    aggregator: AggregatorField = Field(
        default="mean",
        validate_default=True,
        description="how to combine the updates: an aggregator such as Krum(num_byzantine=2); the name of one without required "
        "parameters: mean, median, geometric_median; or your own function, or its path, package.module:function",
    )

    @model_validator(mode="after")
    def _updates_are_enough(self) -> Self:
        if self.min_clients < self.rule.fewest:
            raise RecipeError(
                f"aggregator {self.rule!r} needs {self.rule.fewest} updates, but min_clients={self.min_clients} lets a round "
                "have fewer: raise min_clients"
            )
        return self

    @classmethod
    def recorded(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return super().recorded(_in_one(fields))

    @property
    def functions(self) -> Sequence[str]:
        return (self.rule.path,) if isinstance(self.rule, OwnFunction) else ()

    @property
    def rule(self) -> Aggregator:
        """The aggregator."""
        assert isinstance(self.aggregator, Aggregator), "validation converts whatever was given"
        return self.aggregator


def _in_one(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A job's fields, with an earlier version's aggregator fields merged into one."""
    rest = {name: value for name, value in fields.items() if name not in _FLAT}
    name = fields.get("aggregator")
    if not isinstance(name, str) or name not in AGGREGATORS:  # it includes its parameters, or is the path of a function
        return rest
    flat = _BEFORE_THERE_WAS_A_CHOICE.get(name, {}) | {what: fields[what] for what in _FLAT if what in fields}
    own = {_RENAMED.get(what, what): value for what, value in flat.items() if value is not None}
    return {**rest, "aggregator": written(chosen({"kind": name, **own}))}
