"""`job.json`, what a job is, and `result.json`, what it came to: typed and frozen."""

import hashlib
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from fedpool.left_out import is_none
from fedpool.messages import ClientJob, NamedCode
from fedpool.store import to_json
from fedpool.tasks.arithmetic import BEFORE, Arithmetic
from fedpool.tensors import Digest
from fedpool.written import Written

JOB_FORMAT = 1

JobOutcome = Literal["COMPLETED", "FAILED", "CANCELLED"]


class Parent(Written):
    """What a job is a fork of: another one, and the round whose global model it starts from."""

    job_id: str
    round: int


class EnvironmentRecord(Written):
    """Where a job was begun: class of the environment, and its settings that are nobody's
    secret.
    """

    type: str
    settings: dict[str, Any]


class JobRecord(Written):
    """What a job is, from its first moment on.

    Attributes:
        parent: what it is a fork of.
        simulated: whether its sites were of the machine that ran it, and no one else's.
        template: whether it never runs itself: a deployment makes its jobs from it.
        environment: where it was begun; None for a job of an earlier version.
        recipe: class of the recipe under `type`, and its fields.
        given: names of the fields that the user chose; None when nobody knows, as of a job of an
            earlier version.
        client: what its sites were told.
        arithmetic_number: of its arithmetic.
        sites: in their order.
        code: what it needs beside fedpool and what is installed, if anything.
        model: the initial one.
        hole_names: of the tensors that need not be finite, see `fedpool.tasks.holes`; None for a
            job of an earlier version.
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
            raise ValueError("it names no class of recipe")
        return value

    @field_validator("arithmetic_number")
    @classmethod
    def _is_known(cls, value: int) -> int:
        Arithmetic.numbered(value)
        return value

    @property
    def kind(self) -> str:
        """Class of the recipe."""
        return str(self.recipe["type"])

    @property
    def fields(self) -> dict[str, Any]:
        """Of the recipe."""
        return {name: value for name, value in self.recipe.items() if name != "type"}

    @property
    def arithmetic(self) -> Arithmetic:
        """How its numbers come about."""
        return Arithmetic.numbered(self.arithmetic_number)

    @property
    def holes(self) -> frozenset[str] | None:
        """Names of the tensors that need not be finite; None for a job of an earlier version,
        whose updates all must be.
        """
        return None if self.hole_names is None else frozenset(self.hole_names)


class ScoredModel(Written):
    """A global model: the round that it is the start of, where it lies, and its score, if it has
    one.
    """

    round: int
    path: str
    metrics: dict[str, float]
    denominators: dict[str, float]


class JobResult(Written):
    """What a job came to; its presence says that the job has ended.

    Attributes:
        error: what it failed of.
        stopped_by: what stopped the training early.
        evaluation_error: why the final model has no score although sites were asked for one.
        endings: site -> how its script failed after its last round.
        num_rounds: training rounds that were committed.
        num_records: rounds that were committed.
        cross_site: of `cross_site.json`, where there is one.
        last_record_sha256: hash of the newest record; of `job.json` before the first.
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
        """The same with its own hash."""
        return self.model_copy(update={"sha256": self.own_sha256()})

    def own_sha256(self) -> str:
        """What `sha256` has to be."""
        # A job of an earlier version lacks some fields: what was not there is no part of the hash.
        said = self.model_dump(mode="json", exclude={"sha256"}, exclude_unset=True)
        return hashlib.sha256(to_json(said)).hexdigest()
