"""`Recipe`, the base of every recipe: a frozen model of *what* to run; the environment says where.

`fedpool.training_recipe` adds the fields of recipes that train.

Building a recipe checks everything that can be checked in advance. Prefect shows the fields'
descriptions and bounds as a form. The two fields with the user's files or objects (`model`,
`train_script`) become plain values at once: tensors with their spec, and a content-addressed
bundle.
"""

import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    PrivateAttr,
    SkipValidation,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedpool.bounds import MAX_WEIGHT, Range, check_ranges
from fedpool.bundle import build_bundle
from fedpool.conditions import MODE_FIELDS, choose_mode
from fedpool.errors import RecipeError
from fedpool.exclude import check_excluded, excluded
from fedpool.executable import Executable
from fedpool.fields import none_is_empty, one_or_many
from fedpool.filter_field import Filters
from fedpool.filters import described
from fedpool.initial import InitialModel, initial_model
from fedpool.messages import ClientJob, Stored
from fedpool.paths import check_name, check_new_names
from fedpool.restorable import Inherited, Restorable
from fedpool.script_values import check_values, site_arguments, split_arguments
from fedpool.tensors import Digest
from fedpool.training_terms import TrainingTerms

SERVER = "server"
"""The owner of a job's final model, in tables that name owners."""
SERVER_BEST = "server-best"
"""The owner of its best model, if that isn't the final one."""


def _model_form(model: InitialModel) -> dict[str, Any]:
    return {"sha256": model.digest.sha256, "tensors": len(model.spec), "parameters": model.num_parameters}


class Recipe(Restorable, Executable, TrainingTerms):
    """The fields of all recipes, whether they train or not. Frozen; unknown fields are refused.

    Algorithms derive from `TrainingRecipe`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    name: str = Field(description="name of the job: letters, digits, '.', '_' and '-'", max_length=64)
    model: Annotated[SkipValidation[Any], PlainSerializer(_model_form)] = Field(
        description="initial model: a torch.nn.Module, a state dict, the path of a checkpoint, or a class_path with its args"
    )
    train_script: str = Field(description="path of the client script")
    train_args: str | tuple[str, ...] = Field(
        default="", description="command line of the client script, as one string or a list"
    )
    min_clients: int = Field(description="accepted updates that a round needs; with fewer, it fails", ge=1)
    initial_ckpt: Path | None = Field(
        default=None,
        description="checkpoint whose values replace the initial model's; names must match, apart from wrappers' prefixes",
    )
    filters: Filters = Field(
        default=(),
        description="filters of the updates: applied at the sites in this order, undone at the coordinator in reverse order",
    )
    key_metric: str = Field(default="accuracy", description="metric that selects the best model", min_length=1)
    key_metric_mode: Literal["max", "min"] = Field(
        default="max",
        description="whether a higher or lower key metric is better; if omitted, it follows a stop_cond on that metric",
    )
    metric_ranges: Annotated[dict[str, Range], AfterValidator(check_ranges)] = Field(
        default_factory=dict,
        description='metric -> its lowest and highest value, e.g. {"accuracy": [0, 1], "loss": [0, null]}; an update whose '
        "metric is outside is rejected",
    )
    max_weight: float = Field(
        default=MAX_WEIGHT,
        description="largest weight of an update: the steps or rows that a site may report; more is rejected",
        gt=0,
        allow_inf_nan=False,
    )
    seed: int = Field(
        default=0, description="seed of sampling and, with site and round, of every session", ge=0, lt=2**63
    )
    config: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="values that flare.get_config() returns at every site; per_site_config and the site's own override them",
    )
    per_site_config: dict[str, dict[str, JsonValue]] = Field(
        default_factory=dict,
        description="site -> values that flare.get_config() returns there; the key train_args replaces the command line",
    )
    round_timeout: float | None = Field(
        default=None,
        description="seconds after which a round's missing sites are killed and count as failed; empty: never",
        gt=0,
        allow_inf_nan=False,
    )
    quorum_grace: float | None = Field(
        default=None,
        description="once min_clients updates are in, others get this share of the time so far, e.g. 0.5; empty: all they need",
        ge=0,
        allow_inf_nan=False,
    )
    round_retries: int = Field(
        default=0,
        description="how often a round with fewer than min_clients updates asks the missing sites again",
        ge=0,
        le=1000,
    )
    site_retries: int = Field(
        default=1,
        description="how often, in a round, a failed script is restarted, and a lost site is asked again",
        ge=0,
        le=1000,
    )
    site_patience_s: float = Field(
        default=120.0,
        description="seconds that a round waits for a site whose worker is lost or offline, or whose work pool is paused",
        ge=0,
        allow_inf_nan=False,
    )
    include: tuple[str, ...] = Field(
        default=(), description="more files and folders for the bundle, relative to the client script's folder"
    )
    threads_per_site: int = Field(
        default=1,
        description="torch threads of each client script; recorded, because a sum's bits can depend on it",
        ge=1,
        le=1024,
    )

    _arguments: tuple[str, ...] = PrivateAttr()
    _site_arguments: dict[str, tuple[str, ...]] = PrivateAttr()

    @field_validator("include", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return one_or_many(value)

    @field_validator("config", "per_site_config", "metric_ranges", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return none_is_empty(value)

    @field_validator("name")
    @classmethod
    def _name_fits(cls, value: str) -> str:
        return check_name("name", value)

    @field_validator("train_script", mode="before")
    @classmethod
    def _script_path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _prepare(self, info: ValidationInfo) -> Self:
        inherited = Inherited.of(info)
        self._given = inherited.given if inherited else frozenset(self.model_fields_set)
        if inherited is None:
            check_new_names("name", [self.name])
            check_new_names("site", dict.fromkeys([*self.aggregation_weights, *self.per_site_config]))
        if self._given is not None and (inherited is None or inherited.changed & MODE_FIELDS):
            mode = choose_mode(self.key_metric, self.key_metric_mode, self.stop_condition, self._given)
            object.__setattr__(self, "key_metric_mode", mode)
        self._bundle = inherited.bundle if inherited else build_bundle(self.train_script, self.include)
        self._arguments = split_arguments(self.train_args, "train_args")
        check_values("config", self.config, sets_itself=self.client_config, known=type(self).model_fields)
        self._site_arguments = site_arguments(self.per_site_config)
        if not isinstance(self.model, InitialModel):
            folder = Path(self.train_script).resolve().parent
            object.__setattr__(self, "model", initial_model(self.model, self.initial_ckpt, folder=folder))
        check_excluded(self.exclude_vars, self.model.spec)
        self.model.check_finite(excluded(self.exclude_vars, self.model.spec))
        return self

    @classmethod
    def earlier(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        # The largest double, which is no limit.
        return {**super().earlier(fields), "max_weight": sys.float_info.max}

    @property
    def starts_own_models(self) -> bool:
        """Whether a site starts its own model from the job's initial one when it is first drawn."""
        return False

    def client_job(self, job_id: str, initial: Digest) -> ClientJob:
        """The values that a job's sites need.

        Args:
            initial: the model that the job's first round starts from.
        """
        return ClientJob(
            job_id=job_id,
            total_rounds=self.num_rounds,
            entry=self.bundle.entry,
            bundle_sha256=self.bundle.sha256,
            imports=self.bundle.imports,
            arguments=self._arguments,
            site_arguments=self._site_arguments,
            config={**self.config, **self.client_config},
            site_config={
                site: {key: value for key, value in config.items() if key != "train_args"}
                for site, config in self.per_site_config.items()
            },
            transfer=self.params_transfer_type,
            exclude=self.exclude_vars,
            filters=described(self.filters),
            seed=self.seed,
            threads=self.threads_per_site,
            restarts=self.site_retries,
            initial=Stored(sha256=initial.sha256, size=initial.size) if self.starts_own_models else None,
        )

    def check_sites(self, sites: Sequence[str]) -> None:
        """Check the recipe against an environment's sites.

        Raises:
            RecipeError: there are too few sites, or the recipe names a site that the environment
                lacks.
        """
        check_new_names("site", sites)
        if self.min_clients > len(sites):
            raise RecipeError(
                f"min_clients={self.min_clients}, but the environment has {len(sites)} sites: no round could succeed"
            )
        if self.cross_site_eval and (taken := sorted({SERVER, SERVER_BEST} & set(sites))):
            raise RecipeError(f"cross_site_eval calls a model of the server {taken[0]!r}: rename the site of that name")
        for what in ("aggregation_weights", "per_site_config"):
            if unknown := sorted(set(getattr(self, what)) - set(sites)):
                raise RecipeError(f"{what} names {', '.join(unknown)}, but the sites are {', '.join(sites[:8])}")

    @property
    def client_config(self) -> Mapping[str, Any]:
        """The algorithm's additions to `config`; `per_site_config` and the site override them."""
        return {}

    @property
    def functions(self) -> Sequence[str]:
        """Import paths of named functions, `module:function`; they travel like the class."""
        return ()

    @abstractmethod
    def strategy(self, num_sites: int) -> Any:
        """The recipe's algorithm: a `fedpool.tasks.strategy.Strategy`.

        Args:
            num_sites: number of sites of the job, including those that don't take part in a round.
        """
