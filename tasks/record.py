"""`round.json`, the commit of a round: its assignment, outcomes and results, typed and frozen.

Every record is written in one form. A field that is None in jobs of earlier versions, or that a
round doesn't use, is left out of the JSON.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from fedpool.left_out import is_empty, is_false, is_none
from fedpool.messages import Described, Task
from fedpool.paths import JobPaths, check_name
from fedpool.store import Store
from fedpool.tensors import Digest
from fedpool.written import Written

SiteName = Annotated[str, AfterValidator(partial(check_name, "site"))]
"""Names that are safe in the store's paths."""

RECORD_PROTOCOL = 3
"""The form of `round.json`. It changes less often than what sites and coordinators send."""


class SiteEntry(Written):
    """An entry of a site."""

    site: SiteName


class Entry(SiteEntry):
    """The outcome of asking a site once."""

    attempt: int = Field(ge=0)


class UpdateEntry(Entry):
    """An update that a site sent."""

    sha256: str | None


class AcceptedEntry(UpdateEntry):
    """An update that was accepted.

    Attributes:
        num_eval_examples: the number of examples that the metrics are of, according to the site.
        metrics: None for one that was not finite.
        norm: the L2 norm of its difference to the global model, if that is limited.
        scale: the factor by which the difference was multiplied.
    """

    manifest_sha256: str
    size: int
    params_type: Literal["FULL", "DIFF"] | None
    weight: float
    num_eval_examples: float | None = Field(default=None, exclude_if=is_none)
    metrics: dict[str, float | None]
    logged: dict[str, float | None]
    seconds: float
    norm: float | None = Field(default=None, exclude_if=is_none)
    scale: float | None = Field(default=None, exclude_if=is_none)

    @property
    def metrics_weight(self) -> float:
        """The weight of its metrics: their number of examples if the site sent it, else its own."""
        return self.weight if self.num_eval_examples is None else self.num_eval_examples


class RejectedEntry(UpdateEntry):
    """An update that was rejected."""

    manifest_sha256: str | None
    code: str
    reason: str


class FailedEntry(Entry):
    """A site that was asked and sent nothing; `away` if it was unreachable."""

    cause: str
    away: bool = Field(default=False, exclude_if=is_false)


class ProbedEntry(UpdateEntry):
    """A good update from a site in quarantine: it is not used, but ends the quarantine."""

    manifest_sha256: str


class LateEntry(Entry):
    """A site that hadn't answered when the round closed."""


class LateAcceptedEntry(AcceptedEntry):
    """An update of the earlier round `round` that counts in this one."""

    round: int = Field(ge=0)
    staleness: int = Field(ge=1)


class LateRejectedEntry(RejectedEntry):
    """An update of an earlier round that was rejected."""

    round: int = Field(ge=0)


class LateProbedEntry(ProbedEntry):
    """A good update of an earlier round, from a site in quarantine."""

    round: int = Field(ge=0)


JudgedLate = LateAcceptedEntry | LateRejectedEntry | LateProbedEntry
"""The outcome of an update of an earlier round."""


class NotAskedEntry(SiteEntry):
    """A site that the round left out."""

    reason: str


class Timings(Written):
    """How long a round took, in seconds to the millisecond."""

    train_s: float
    aggregate_s: float
    round_s: float


class WhoseModel(Written):
    """The owner of a round's global model, and the round that starts from it or received it."""

    owner: str
    round: int


class SubmittedModel(Written):
    """A model that a later round scores."""

    owner: str
    round: int
    sha256: str
    size: int

    @property
    def digest(self) -> Digest:
        """The model's digest."""
        return Digest(self.sha256, self.size)


class RoundRecord(Written):
    """The record of a round.

    Attributes:
        sites: the sites that took part, in order; the entries of each kind are in the same order,
            one for each attempt.
        late_accepted, late_rejected, late_probed: updates of earlier rounds that arrived after
            those had closed, as this round judged them, by site and round; see
            `fedpool.tasks.staleness`.
        metrics: score of the round's global model, over the sites; without late updates, which
            scored another model.
        denominators: metric -> denominator of its mean.
        logged: scalars that scripts have logged, over the sites.
        base: the round's global model, `global` in JSON.
        next_global: the next one; None if the round made none.
        state: the strategy's state for the next round; None if it has none, and after an
            evaluation.
        models: if sites submitted models, those that the following rounds score, in order.
        virtual_time: when it closed, in a simulation in virtual time; see
            `fedpool.tasks.virtual_time`.
        filters: those that its updates have passed, if any.
        previous_sha256: hash of the previous round's record; in round 0, of `job.json`.
    """

    protocol: int
    job_id: str
    round: int
    task: Task
    sites: tuple[SiteName, ...]
    accepted: tuple[AcceptedEntry, ...]
    rejected: tuple[RejectedEntry, ...]
    failed: tuple[FailedEntry, ...]
    probed: tuple[ProbedEntry, ...]
    late: tuple[LateEntry, ...]
    late_accepted: tuple[LateAcceptedEntry, ...] = Field(default=(), exclude_if=is_empty)
    late_rejected: tuple[LateRejectedEntry, ...] = Field(default=(), exclude_if=is_empty)
    late_probed: tuple[LateProbedEntry, ...] = Field(default=(), exclude_if=is_empty)
    not_asked: tuple[NotAskedEntry, ...] = Field(default=(), exclude_if=is_empty)
    metrics: dict[str, float]
    denominators: dict[str, float]
    logged: dict[str, float]
    timings: Timings
    virtual_time: float | None = Field(default=None, exclude_if=is_none, ge=0)
    model: WhoseModel
    base: Annotated[Digest, Field(alias="global")]
    next_global: Digest | None
    state: Digest | None
    models: tuple[SubmittedModel, ...] | None = Field(default=None, exclude_if=is_none)
    filters: tuple[Described, ...] = Field(default=(), exclude_if=is_empty)
    previous_sha256: str

    what: ClassVar[str] = "a round"

    @property
    def judged_late(self) -> tuple[JudgedLate, ...]:
        """The updates of earlier rounds that arrived in this one."""
        return (*self.late_accepted, *self.late_rejected, *self.late_probed)


def stored_records(store: Store, job_id: str) -> Iterator[RoundRecord]:
    """The records of a job's rounds, from the first on, each read when needed."""
    paths = JobPaths(job_id)
    for number in count():
        if not store.exists(path := paths.record(number)):
            return
        yield RoundRecord.read(store, path)


def round_ms(seconds: float) -> float:
    """Seconds to the millisecond."""
    return float(f"{seconds:.3f}")


def known_weights(records: Sequence[RoundRecord]) -> dict[str, float]:
    """site -> weight of its last accepted training update."""
    return {
        entry.site: entry.weight
        for record in records
        if record.task == "train"
        for entry in (*record.late_accepted, *record.accepted)
    }


def of_global_models(records: Sequence[RoundRecord]) -> list[RoundRecord]:
    """The rounds that score the global model they start from; no submissions, no other models."""
    return [record for record in records if record.task != "submit_model" and record.model.round == record.round]


def num_trained(records: Sequence[RoundRecord]) -> int:
    """Number of training rounds; they come first."""
    return sum(record.task == "train" for record in records)
