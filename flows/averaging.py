"""What the recipes share that average whole models: the choice of the aggregator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from fedpool.errors import RecipeError
from fedpool.recipe import Recipe
from fedpool.tasks.aggregators import Aggregator, imported, make_aggregator
from fedpool.tasks.geometry import Geometry
from fedpool.tasks.strategy import Strategy


@dataclass(frozen=True)
class Averaging(Strategy):
    """A strategy that makes one update of all, by an aggregator."""

    rule: Aggregator

    @property
    def surveys(self) -> bool:
        return self.rule.surveys

    def survey(self, geometry: Geometry) -> Self:
        return replace(self, rule=self.rule.survey(geometry))


class AveragingRecipe(Recipe):
    """A recipe whose rounds average the sites' models, with an aggregator of the user's choice."""

    aggregator: str = Field(
        default="mean",
        description="how updates become one: mean, median, trimmed_mean, krum, multi_krum, bulyan, geometric_median, "
        "norm_clipped_mean, or the path of a function, package.module:function. The means, the geometric median and functions "
        "count updates by their weights; the others count all alike",
    )
    num_byzantine: int | None = Field(
        default=None, description="for krum, multi_krum and bulyan: how many updates of a round may be arbitrary", ge=1
    )
    trim_ratio: float | None = Field(
        default=None, description="for trimmed_mean: the share of values that is dropped at each end", gt=0, lt=0.5
    )
    num_selected: int | None = Field(
        default=None,
        description="for multi_krum: how many updates are averaged; empty: all but num_byzantine and two",
        ge=1,
    )
    clip_norm: float | None = Field(
        default=None,
        description="for norm_clipped_mean: the L2 norm that differences to the global model are scaled down to",
        gt=0,
        allow_inf_nan=False,
    )

    even_median: Literal["element", "midpoint"] | None = Field(
        default=None,
        description="for bulyan: the median of an even number of values: element, the lower of the middle two, as one that the "
        "paper allows; or midpoint, their mean; empty: element",
    )
    weighted_median: bool | None = Field(
        default=None,
        description="for geometric_median: whether updates count by their weights, as in the paper, or all alike, which a site "
        "that lies about its weight cannot change; empty: by their weights",
    )

    _aggregator: Aggregator = PrivateAttr()

    @classmethod
    def earlier(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        own: Mapping[str, Mapping[str, Any]] = {
            "bulyan": {"even_median": "midpoint"},
            "geometric_median": {"weighted_median": False},
        }
        return {**super().earlier(fields), **own.get(str(fields.get("aggregator")), {})}

    @field_validator("aggregator", mode="before")
    @classmethod
    def _path_of_function(cls, value: Any) -> Any:
        if not callable(value):
            return value
        path = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', '')}"
        if "<" in path or imported(path) is not value:  # <lambda>, <locals>
            raise RecipeError(f"aggregator {value!r} cannot be imported by its path {path!r}: put it into a module")
        return path

    @model_validator(mode="after")
    def _choose_aggregator(self) -> Self:
        self._aggregator = make_aggregator(
            self.aggregator,
            num_byzantine=self.num_byzantine,
            trim_ratio=self.trim_ratio,
            num_selected=self.num_selected,
            clip_norm=self.clip_norm,
            even_median=self.even_median,
            weighted_median=self.weighted_median,
            min_clients=self.min_clients,
        )
        return self

    @property
    def functions(self) -> Sequence[str]:
        return (self.aggregator,) if ":" in self.aggregator else ()

    @property
    def rule(self) -> Aggregator:
        """The aggregator."""
        return self._aggregator
