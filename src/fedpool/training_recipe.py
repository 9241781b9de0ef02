"""`TrainingRecipe`, the base of recipes that train: fields for rounds, sampling, gate, scores."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from fedpool.conditions import StopCondition, parse_condition
from fedpool.errors import RecipeError
from fedpool.fields import none_is_empty, one_or_many
from fedpool.recipe import Recipe
from fedpool.weights import check_weights


class TrainingRecipe(Recipe):
    """The fields that all recipes that train have. Frozen; unknown fields are refused.

    Subclasses add their algorithm's parameters and provide its `strategy`.
    """

    num_rounds: int = Field(description="training rounds", ge=1, le=100_000)
    clients_per_round: int | None = Field(
        default=None, description="sites drawn for each round, as a function of the seed; empty: all", ge=1
    )
    over_sample: int = Field(
        default=0,
        description="sites drawn beyond clients_per_round: the round takes the first clients_per_round accepted updates",
        ge=0,
    )
    params_transfer_type: Literal["FULL", "DIFF"] = Field(
        default="FULL", description="what sites send: their parameters, or the difference to the model they received"
    )
    aggregation_weights: Annotated[dict[str, float], AfterValidator(check_weights)] = Field(
        default_factory=dict, description="site -> factor on its updates' weight; 1 for a site that is not named"
    )
    exclude_vars: tuple[str, ...] = Field(
        default=(),
        description="regular expressions; parameters whose names match one are not exchanged and stay at the site",
    )
    stop_cond: str | None = Field(
        default=None, description='stop early once the global model satisfies this, e.g. "accuracy >= 0.8"'
    )
    patience: int | None = Field(
        default=None, description="stop early after this many rounds without a better key metric", ge=1
    )
    max_update_norm: float | None = Field(
        default=None,
        description="largest L2 norm of an update's difference to the global model, over its floating point parameters",
        gt=0,
        allow_inf_nan=False,
    )
    clip_updates: bool = Field(
        default=False, description="scale an update with a larger norm down to max_update_norm instead of rejecting it"
    )
    max_rejections: int | None = Field(
        default=None,
        description="rejected updates in a row after which a site is quarantined, until one of its updates passes the gate",
        ge=1,
    )
    keep_updates: Literal["all", "last", "none"] = Field(
        default="all",
        description="the rounds whose updates stay in the store afterwards: all, the last, or none; hashes always stay",
    )
    final_evaluation: bool = Field(
        default=True,
        description="after the training, one more round in which sites score the final model, if any site reports metrics",
    )
    cross_site_eval: bool = Field(
        default=False,
        description="after the training, score every site's best local model and the server's models at every site",
    )

    @field_validator("exclude_vars", mode="before")
    @classmethod
    def _names_one_or_many(cls, value: Any) -> Any:
        return one_or_many(value)

    @field_validator("aggregation_weights", mode="before")
    @classmethod
    def _no_weights_are_none(cls, value: Any) -> Any:
        return none_is_empty(value)

    @field_validator("stop_cond")
    @classmethod
    def _condition_parses(cls, value: str | None) -> str | None:
        return None if value is None else str(parse_condition(value))

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Self:
        if self.clients_per_round is not None and self.min_clients > self.clients_per_round:
            raise RecipeError(
                f"min_clients={self.min_clients} is more than clients_per_round={self.clients_per_round}: no round could succeed"
            )
        if self.over_sample and self.clients_per_round is None:
            raise RecipeError(
                f"over_sample={self.over_sample} without clients_per_round: set how many updates a round takes"
            )
        if self.clip_updates and self.max_update_norm is None:
            raise RecipeError("clip_updates without max_update_norm: set the norm that updates are scaled down to")
        if self.cross_site_eval and not self.final_evaluation:
            raise RecipeError("cross_site_eval includes the final evaluation: leave out final_evaluation=False")
        return self

    @property
    def sample_size(self) -> int | None:
        """Number of sites drawn for a round; None: all."""
        return None if self.clients_per_round is None else self.clients_per_round + self.over_sample

    @property
    def stop_condition(self) -> StopCondition | None:
        """`stop_cond`, parsed."""
        return parse_condition(self.stop_cond) if self.stop_cond else None

    def check_sites(self, sites: Sequence[str]) -> None:
        if self.sample_size is not None and self.sample_size > len(sites) >= self.min_clients:
            more = f" with over_sample={self.over_sample} more" if self.over_sample else ""
            raise RecipeError(
                f"clients_per_round={self.clients_per_round}{more}, but the environment has {len(sites)} sites"
            )
        super().check_sites(sites)
