"""The values that cross between the coordinator and a site, each a frozen pydantic model because
the other side is not trusted.

`ClientJob` and `SiteAssignment` go to the site; `UpdateManifest` comes back, and is what
`update.json` holds.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from fedpool.left_out import is_empty, is_none
from fedpool.storable import storable

SITE_PROTOCOL = 3

Task = Literal["train", "evaluate", "submit_model"]


Text = Annotated[str, AfterValidator(storable)]
"""What a script has said, as it can be stored; see `fedpool.storable`."""


class Value(BaseModel):
    """Base of the values here: frozen, and nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Stored(Value):
    """An object in the store, by its content."""

    sha256: str
    size: int = Field(ge=0)


class NamedCode(Value):
    """Code of the user's that a job has brought: its hash, and the modules of it that are
    imported.
    """

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    modules: tuple[str, ...] = Field(min_length=1)


Described = dict[str, JsonValue]
"""A filter: its class under `type`, and its fields."""


class ClientJob(Value):
    """What every site needs to know of a job, once."""

    job_id: str
    total_rounds: int
    entry: str = Field(description="name of the client script inside the bundle")
    bundle_sha256: str
    imports: tuple[str, ...] = Field(description="dotted names that the script imports, for preloading")
    arguments: tuple[str, ...] = Field(description="command line of the script")
    site_arguments: dict[str, tuple[str, ...]] = Field(description="command lines of the sites that have their own")
    config: dict[str, Any] = Field(description="what get_config() returns everywhere")
    site_config: dict[str, dict[str, Any]] = Field(
        description="what it returns besides at the sites that have their own"
    )
    transfer: Literal["FULL", "DIFF"]
    exclude: tuple[str, ...] = Field(description="patterns of the parameters that stay at the site")
    restarts: int = Field(description="how often a script that fails is started again with the same assignment", ge=0)
    seed: int
    threads: int
    # Left out where there is none: a site of an earlier version knows no such field.
    initial: Stored | None = Field(
        default=None,
        description="the model of round 0, for a recipe whose sites start one of their own from it",
        exclude_if=is_none,
    )
    filters: tuple[Described, ...] = Field(
        default=(), description="what the host does to updates before they leave", exclude_if=is_empty
    )
    filter_code: NamedCode | None = Field(
        default=None, description="code of the user's that the filters need", exclude_if=is_none
    )


class Used(Value):
    """Which of a site's updates counted last: what the site keeps of it holds, and what it kept
    with a later one does not.
    """

    round: int = Field(description="in which it was sent; -1: none has counted", ge=-1)
    attempt: int = Field(default=0, ge=0)
    scale: float = Field(
        default=1.0, description="what its difference to the global model was multiplied by", ge=0, le=1
    )


class SiteAssignment(Value):
    """What one site is asked to do in one round."""

    site: str
    round: int
    attempt: int = Field(default=0, description="how often this site has been asked in this round before", ge=0)
    task: Task
    base_sha256: str = Field(description="sha256 of the round's global model")
    base_size: int
    state_sha256: str | None = Field(
        default=None, description="sha256 of the strategy's state, for one that sites need to see"
    )
    state_size: int = 0
    # Left out where there is none: a site of an earlier version knows no such field, and needs to
    # only for SCAFFOLD.
    used: Used | None = Field(
        default=None,
        description="this site's last update that counted, for a strategy that sites see",
        exclude_if=is_none,
    )
    timeout_s: float | None = Field(description="seconds until the coordinator waits no longer; None: for ever")


class UpdateManifest(Value):
    """The commit of what a site sent in a round.

    `weight` is the site's `NUM_STEPS_CURRENT_ROUND` (1 when absent), as a string when it was not a
    finite number, which JSON cannot hold and the gate refuses. A metric that was not finite is
    null. `filters` are those that the update has passed.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    protocol: Literal[3] = 3
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
    # Left out where there are none. None are sent unless the job asks for them: other versions know
    # no such field.
    scalars: Stored | None = Field(
        default=None, description="all that its script has logged, beside the manifest", exclude_if=is_none
    )
    seconds: float
    filters: tuple[Described, ...] = Field(default=(), exclude_if=is_empty)
