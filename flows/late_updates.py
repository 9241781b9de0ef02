"""The field `late` for recipes that average: what happens to late updates."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from fedpool.errors import RecipeError
from fedpool.recipe import Recipe
from fedpool.tasks.guarded import strategy_of
from fedpool.training_recipe import TrainingRecipe


class LateUpdates(TrainingRecipe):
    """A recipe whose rounds may count late updates, see `fedpool.tasks.staleness`."""

    late: Literal["drop", "fold"] = Field(
        default="drop",
        description="what happens to an update that arrives after its round has closed: drop it, or fold it into the next round, "
        "with its weight times 1 / sqrt(1 + staleness)",
    )

    def check_sites(self, sites: Sequence[str]) -> None:
        super().check_sites(sites)
        strategy = strategy_of(self, len(sites))
        if folds(self) and (strategy.extras or strategy.shared):
            raise RecipeError(
                f"late='fold' does not work with {type(strategy).__name__}: what its sites send beside parameters (extras), or "
                "see of the server's state, is only valid in the round that asked for it. Leave out late"
            )


class NoLateUpdates(TrainingRecipe):
    """A recipe whose updates belong to the round that asked for them."""

    @model_validator(mode="before")
    @classmethod
    def _late_is_not_folded(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "late" in data:
            raise RecipeError(
                f"{cls.__name__} has no late={data['late']!r}: its updates belong to the round that asked for them. Leave out "
                "late, or use a recipe that averages, such as FedAvgRecipe"
            )
        return data


def folds(recipe: Recipe) -> bool:
    """Whether an update that arrives after its round has closed counts in a later one."""
    return isinstance(recipe, LateUpdates) and recipe.late == "fold"
