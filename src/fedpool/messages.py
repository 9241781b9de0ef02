"""The values that the coordinator and a site exchange.

They are frozen pydantic models, because neither side trusts the other. `ClientJob` and
`SiteAssignment` go to the site. `UpdateManifest` comes back, as `update.json`.
"""

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from fedpool.left_out import is_empty, is_none
from fedpool.storable import storable

SITE_PROTOCOL = 4

Task = Literal["train", "evaluate", "submit_model"]


Text = Annotated[str, AfterValidator(storable)]
"""A script's text in a form that can be stored; see `fedpool.storable`."""


def inside_bundle(name: str) -> str:
    """Return the name of a file in a bundle, if it can't lead out of the bundle's folder.

    Raises:
        ValueError: it is absolute, goes up, or isn't a file's name.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name or name == ".":
        raise ValueError(f"{name!r} is not the name of a file inside its bundle")
    return name


def _module(name: str) -> str:
    if name and not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{name!r} is not the dotted name of a module")
    return name


Inside = Annotated[str, AfterValidator(inside_bundle)]
"""The name of a file in a bundle."""
Module = Annotated[str, AfterValidator(_module)]
"""The dotted name of a module, or of something in it."""


class Value(BaseModel):
    """Base of the values here: frozen, strict, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Stored(Value):
    """An object in the store, identified by its content."""

    sha256: str
    size: int = Field(ge=0)


class NamedCode(Value):
    """User code that a job brought: its hash, and the modules to import from it."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    modules: tuple[str, ...] = Field(min_length=1)


Described = dict[str, JsonValue]
"""A filter: its class under `type`, and its fields."""


class ClientJob(Value):
    """What every site needs to know about a job, sent once."""

    job_id: str
    total_rounds: int
    entry: Inside = Field(description="name of the client script inside the bundle")
    bundle_sha256: str
    imports: tuple[Module, ...] = Field(description="dotted names that the script imports, for preloading")
    arguments: tuple[str, ...] = Field(description="command line of the script")
    site_arguments: dict[str, tuple[str, ...]] = Field(description="command lines of the sites that have their own")
    config: dict[str, Any] = Field(description="values that get_config() returns at every site")
    site_config: dict[str, dict[str, Any]] = Field(description="values that it returns in addition at some sites")
    transfer: Literal["FULL", "DIFF"]
    exclude: tuple[str, ...] = Field(description="patterns of the parameters that stay at the site")
    restarts: int = Field(description="how often a failed script is restarted with the same assignment", ge=0)
    seed: int
    threads: int
    # Optional fields are left out if unused, because sites of earlier versions refuse unknown
    # fields.
    initial: Stored | None = Field(
        default=None,
        description="the model of round 0, for recipes whose sites start a model of their own from it",
        exclude_if=is_none,
    )
    filters: tuple[Described, ...] = Field(
        default=(), description="filters that the host applies to updates", exclude_if=is_empty
    )
    filter_code: NamedCode | None = Field(
        default=None, description="user code that the filters need", exclude_if=is_none
    )


class Used(Value):
    """The site's last update that counted. The state that the site kept with it is valid."""

    round: int = Field(description="the round in which it was sent; -1: none has counted", ge=-1)
    attempt: int = Field(default=0, ge=0)
    scale: float = Field(default=1.0, description="factor on its difference to the global model", ge=0, le=1)


class SiteAssignment(Value):
    """What a site is asked to do in a round."""

    site: str
    round: int
    attempt: int = Field(default=0, description="how often this site was already asked in this round", ge=0)
    task: Task
    base_sha256: str = Field(description="sha256 of the round's global model")
    base_size: int
    state_sha256: str | None = Field(default=None, description="sha256 of the strategy's state, if sites need it")
    state_size: int = 0
    # Left out if unused, because sites of earlier versions refuse unknown fields. Only SCAFFOLD
    # needs it.
    used: Used | None = Field(
        default=None,
        description="this site's last update that counted, if sites need the strategy's state",
        exclude_if=is_none,
    )
    timeout_s: float | None = Field(description="seconds until the coordinator stops waiting; None: never")


class UpdateManifest(Value):
    """The commit of what a site sent in a round.

    `weight` is the site's `NUM_STEPS_CURRENT_ROUND` (1 if absent). It is a string if it wasn't a
    finite number, which JSON can't represent and the gate rejects. A metric that wasn't finite is
    null. `filters` are those that the update has passed. Manifests of protocol 3 have no
    `job_digest`.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    protocol: Literal[3, 4] = 4
    job_id: str
    site: str
    round: int
    attempt: int = 0
    task: Task
    base_sha256: str
    assignment_sha256: str
    params_type: Literal["FULL", "DIFF"] | None = None
    sha256: str | None = None
    size: int = 0
    weight: Annotated[float, Field(allow_inf_nan=True)] | str = 1.0
    metrics: dict[Text, float | None] = {}
    logged: dict[Text, float | None] = {}
    meta: dict[Text, Text | int | float | bool | None] = {}
    # Left out unless the job asks for them, because other versions refuse unknown fields.
    scalars: Stored | None = Field(
        default=None,
        description="everything that the script logged, in an object next to the manifest",
        exclude_if=is_none,
    )
    seconds: float
    filters: tuple[Described, ...] = Field(default=(), exclude_if=is_empty)
    job_digest: str | None = Field(
        default=None,
        description="what the site ran, see fedpool.job_digest",
        pattern="^[0-9a-f]{64}$",
        exclude_if=is_none,
    )
