"""The typed, frozen contents of `job.json`, which describes a job, and of `result.json`."""

import hashlib
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, field_validator, model_validator

from fedpool.left_out import is_none
from fedpool.messages import ClientJob, NamedCode
from fedpool.store import to_json
from fedpool.tasks.arithmetic import BEFORE, Arithmetic
from fedpool.tensors import Digest
from fedpool.written import Written

JOB_FORMAT = 1

SPEEDS = "speeds"
"""The setting of a simulation with the units of virtual time, site by site."""


class _UsedFields(BaseModel):
    """The fields of a recipe that are used without building it: the class may be unknown here."""

    key_metric: str = ""
    num_rounds: int = 0
    stop_cond: str | None = None
    patience: int | None = None
    aggregation_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}


_USED_FIELDS = TypeAdapter(_UsedFields)
_SPEEDS = TypeAdapter(dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None)

JobOutcome = Literal["COMPLETED", "FAILED", "CANCELLED"]


def _check(type: TypeAdapter[Any], value: Any, *place: str) -> None:
    """Raise a `ValueError` with the place in `value` that has another type."""
    try:
        type.validate_python(value, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in (*place, *found["loc"]))
        raise ValueError(f"{where}: {found['msg']}") from None


class Parent(Written):
    """The job that a job is a fork of, and the round whose global model it starts from."""

    job_id: str
    round: int


class EnvironmentRecord(Written):
    """The environment that a job began in: its class, and the settings that aren't secret."""

    type: str
    settings: dict[str, Any]

    @field_validator("settings")
    @classmethod
    def _has_usable_speeds(cls, value: dict[str, Any]) -> dict[str, Any]:
        _check(_SPEEDS, value.get(SPEEDS), SPEEDS)
        return value


class JobRecord(Written):
    """The description of a job, written when it starts.

    Attributes:
        parent: the job that it is a fork of.
        simulated: whether only the machine that ran the job simulated its sites.
        template: whether it never runs itself: a deployment makes its jobs from it.
        environment: where it began; None for jobs of earlier versions.
        recipe: class of the recipe under `type`, and its fields.
        given: names of the fields that the user chose; None if unknown, as for jobs of earlier
            versions.
        client: the settings that its sites got.
        arithmetic_number: the version of its arithmetic.
        sites: in their order.
        code: the code that it needs in addition to fedpool and installed packages, if any.
        model: the initial model.
        hole_names: the tensors that may hold infinities, see `fedpool.tasks.holes`; None for jobs
            of earlier versions.
        versions: of Python and the packages that wrote it.
    """

    format: int = JOB_FORMAT
    job_id: str
    parent: Parent | None
    simulated: bool
    template: bool
    environment: EnvironmentRecord | None = Field(default=None, exclude_if=is_none)
    recipe: dict[str, Any]
    given: tuple[str, ...] | None = None
    client: ClientJob
    seed: int
    arithmetic_number: Annotated[int, Field(alias="arithmetic")] = BEFORE.number
    sites: tuple[str, ...]
    bundle_sha256: str
    code: NamedCode | None = Field(default=None, exclude_if=is_none)
    model: Digest
    hole_names: Annotated[tuple[str, ...] | None, Field(alias="holes")] = None
    versions: dict[str, str]

    what: ClassVar[str] = "a job"

    @field_validator("recipe")
    @classmethod
    def _has_a_type(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("type"), str):
            raise ValueError("it does not name a recipe class")
        _check(_USED_FIELDS, value)
        return value

    @field_validator("arithmetic_number")
    @classmethod
    def _is_known(cls, value: int) -> int:
        Arithmetic.numbered(value)
        return value

    @model_validator(mode="after")
    def _has_a_speed_for_each_site(self) -> Self:
        speeds = None if self.environment is None else self.environment.settings.get(SPEEDS)
        if speeds is not None and (without := set(self.sites) - speeds.keys()):
            raise ValueError(f"environment.settings.{SPEEDS} lacks {min(without)}")
        return self

    @property
    def kind(self) -> str:
        """Class of the recipe."""
        return str(self.recipe["type"])

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the recipe."""
        return {name: value for name, value in self.recipe.items() if name != "type"}

    @property
    def arithmetic(self) -> Arithmetic:
        """The version of its arithmetic."""
        return Arithmetic.numbered(self.arithmetic_number)

    @property
    def holes(self) -> frozenset[str] | None:
        """Tensors that may hold infinities; None for jobs of earlier versions, where none may."""
        return None if self.hole_names is None else frozenset(self.hole_names)


class ScoredModel(Written):
    """A global model: the round that starts from it, its path, and its score, if any."""

    round: int
    path: str
    metrics: dict[str, float]
    denominators: dict[str, float]


class JobResult(Written):
    """The result of a job. If it exists, the job has ended.

    Attributes:
        error: why the job failed.
        stopped_by: the rule that stopped the training early.
        evaluation_error: why the final model has no score although sites were asked for one.
        endings: site -> how its script failed after its last round.
        num_rounds: committed training rounds.
        num_records: committed rounds.
        cross_site: digest of `cross_site.json`, if there is one.
        last_record_sha256: hash of the newest record; before the first, of `job.json`.
        sha256: of the result without this field.
    """

    format: int = JOB_FORMAT
    job_id: str
    status: JobOutcome
    error: str | None
    stopped_by: str | None
    evaluation_error: str | None = None
    endings: dict[str, str] = Field(default_factory=dict)
    num_rounds: int
    num_records: int
    key_metric: str
    key_metric_mode: Literal["max", "min"]
    final: ScoredModel
    best: ScoredModel
    cross_site: Digest | None
    last_record_sha256: str
    sha256: str = ""

    what: ClassVar[str] = "a job's result"

    def sealed(self) -> Self:
        """The same result with its own hash."""
        return self.model_copy(update={"sha256": self.own_sha256()})

    def own_sha256(self) -> str:
        """The correct value of `sha256`."""
        # Jobs of earlier versions lack some fields. A missing field isn't part of the hash.
        said = self.model_dump(mode="json", exclude={"sha256"}, exclude_unset=True)
        return hashlib.sha256(to_json(said)).hexdigest()
