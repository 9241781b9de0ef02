"""`round.json`, the commit of a round: what was asked, what came, what it was made into. Typed, frozen, and written in one form.

A field that is None in a job of an earlier version, or that a round has no use for, is left out of the JSON.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from fedpool.manifest import PROTOCOL, Task
from fedpool.model import NUM_EVAL_EXAMPLES, NUM_STEPS
from fedpool.paths import JobPaths, check_name
from fedpool.recipe import SERVER
from fedpool.store import Store
from fedpool.tasks.arithmetic import CURRENT, Arithmetic
from fedpool.tasks.gate import Accepted, Failed, Late, Outcome, Probed, Rejected
from fedpool.tasks.metrics import denominators, mean_metrics
from fedpool.tensors import Digest
from fedpool.written import Written, is_empty, is_false, is_none

SiteName = Annotated[str, AfterValidator(partial(check_name, "site"))]
"""Paths in the store are made of it."""


class SiteEntry(Written):
    """What a record says of a site."""

    site: SiteName


class Entry(SiteEntry):
    """What came of asking a site, once."""

    attempt: int = Field(ge=0)


class UpdateEntry(Entry):
    """An update that a site sent."""

    sha256: str | None


class AcceptedEntry(UpdateEntry):
    """An update that was accepted.

    `norm` is the L2 norm of its difference to the global model, where that is limited, and `scale` what the difference was
    multiplied by. `num_eval_examples` is what the site says its metrics are of. A metric that was not finite is None.
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
        """What its metrics count with: the examples that they are of, where the site says so, else its weight."""
        return self.weight if self.num_eval_examples is None else self.num_eval_examples


class RejectedEntry(UpdateEntry):
    """An update that was not."""

    manifest_sha256: str | None
    code: str
    reason: str


class FailedEntry(Entry):
    """A site that was asked and sent nothing; `away` when it could not be reached."""

    cause: str
    away: bool = Field(default=False, exclude_if=is_false)


class ProbedEntry(UpdateEntry):
    """A good update of a site in quarantine: it is not used, and lets the site in again."""

    manifest_sha256: str


class LateEntry(Entry):
    """A site that had not answered when the round closed."""


class NotAskedEntry(SiteEntry):
    """A site that the round went ahead without."""

    reason: str


class Timings(Written):
    """How long a round took, in seconds to the millisecond."""

    train_s: float
    aggregate_s: float
    round_s: float


class WhoseModel(Written):
    """Whose model a round's global one is, and the round that it is the start of, or in which its owner submitted it."""

    owner: str
    round: int


class SubmittedModel(Written):
    """A model that is scored in a round to come."""

    owner: str
    round: int
    sha256: str
    size: int

    @property
    def digest(self) -> Digest:
        """Of the model."""
        return Digest(self.sha256, self.size)


class RoundRecord(Written):
    """The record of a round.

    Attributes:
        sites: that took part, in their order; the entries of each kind are in the same order, one for each time asked.
        metrics: score of the round's global model, over the sites.
        denominators: metric -> what its mean is over.
        logged: scalars that scripts have logged, over the sites.
        base: the round's global model, `global` in JSON.
        next_global: the next one; None when the round made none.
        state: what the strategy carries into the next round; None when it carries nothing, and after an evaluation.
        models: where sites submitted models: whose are scored in the rounds that follow, in their order.
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
    not_asked: tuple[NotAskedEntry, ...] = Field(default=(), exclude_if=is_empty)
    metrics: dict[str, float]
    denominators: dict[str, float]
    logged: dict[str, float]
    timings: Timings
    model: WhoseModel
    base: Annotated[Digest, Field(alias="global")]
    next_global: Digest | None
    state: Digest | None
    models: tuple[SubmittedModel, ...] | None = Field(default=None, exclude_if=is_none)
    previous_sha256: str

    what: ClassVar[str] = "a round"


def round_record(
    *,
    job_id: str,
    round: int,
    task: Task,
    outcomes: Collection[Outcome],
    not_asked: Mapping[str, str] | None = None,
    known_weights: Mapping[str, float],
    owner: str = SERVER,
    origin: int | None = None,
    base: Digest,
    following: Digest | None,
    state: Digest | None,
    models: Sequence[SubmittedModel] | None = None,
    previous_sha256: str,
    timings: Timings,
    arithmetic: Arithmetic = CURRENT,
) -> RoundRecord:
    """The record of a round.

    Args:
        outcomes: one for each time that a site was asked.
        not_asked: site -> why the round went ahead without asking it.
        known_weights: site -> weight of its last training update, for scores that come without one.
        owner: whose model the round's global one is.
        origin: the round that it is the start of; of a site's, the one that it was submitted in; None for this very round.
        base, following, state, models, previous_sha256, timings: see `RoundRecord`.
        arithmetic: of the job.
    """
    ordered = arithmetic.by_site(sorted(outcomes, key=lambda outcome: outcome.attempt), lambda outcome: outcome.site)
    accepted = [_accepted(outcome, known_weights, arithmetic) for outcome in ordered if isinstance(outcome, Accepted)]
    without = not_asked or {}
    return RoundRecord(
        protocol=PROTOCOL,
        job_id=job_id,
        round=round,
        task=task,
        sites=tuple(arithmetic.ordered({outcome.site for outcome in ordered} | set(without))),
        accepted=tuple(accepted),
        rejected=tuple(
            RejectedEntry(
                site=outcome.site,
                attempt=outcome.attempt,
                sha256=outcome.manifest.sha256 if outcome.manifest else None,
                manifest_sha256=outcome.manifest_sha256,
                code=outcome.code,
                reason=outcome.reason,
            )
            for outcome in ordered
            if isinstance(outcome, Rejected)
        ),
        failed=tuple(
            FailedEntry(site=outcome.site, attempt=outcome.attempt, cause=outcome.cause, away=outcome.away)
            for outcome in ordered
            if isinstance(outcome, Failed)
        ),
        probed=tuple(
            ProbedEntry(
                site=outcome.site,
                attempt=outcome.attempt,
                sha256=outcome.update.manifest.sha256,
                manifest_sha256=outcome.update.manifest_sha256,
            )
            for outcome in ordered
            if isinstance(outcome, Probed)
        ),
        late=tuple(
            LateEntry(site=outcome.site, attempt=outcome.attempt) for outcome in ordered if isinstance(outcome, Late)
        ),
        not_asked=tuple(NotAskedEntry(site=site, reason=without[site]) for site in arithmetic.ordered(without)),
        metrics=mean_metrics((entry.metrics_weight, entry.metrics) for entry in accepted),
        denominators=denominators((entry.metrics_weight, entry.metrics) for entry in accepted),
        logged=mean_metrics((entry.weight, entry.logged) for entry in accepted),
        timings=timings,
        model=WhoseModel(owner=owner, round=round if origin is None else origin),
        base=base,
        next_global=following,
        state=state,
        models=None if models is None else tuple(models),
        previous_sha256=previous_sha256,
    )


def _accepted(outcome: Accepted, known_weights: Mapping[str, float], arithmetic: Arithmetic) -> AcceptedEntry:
    manifest = outcome.manifest
    weight = outcome.weight
    num_examples = manifest.meta.get(NUM_EVAL_EXAMPLES) if arithmetic.eval_examples else None
    if manifest.task == "evaluate" and NUM_STEPS not in manifest.meta:
        weight = known_weights.get(outcome.site, weight)
    return AcceptedEntry(
        site=outcome.site,
        attempt=outcome.attempt,
        sha256=manifest.sha256,
        manifest_sha256=outcome.manifest_sha256,
        size=manifest.size,
        params_type=manifest.params_type,
        weight=weight,
        num_eval_examples=None if num_examples is None else float(num_examples),
        metrics=manifest.metrics,
        logged=manifest.logged,
        seconds=round_ms(manifest.seconds),
        norm=outcome.norm,
        scale=None if outcome.norm is None else outcome.scale,
    )


def stored_records(store: Store, job_id: str) -> Iterator[RoundRecord]:
    """The records of a job's rounds, from the first one on, read as they are asked for."""
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
    return {entry.site: entry.weight for record in records if record.task == "train" for entry in record.accepted}


def of_global_models(records: Sequence[RoundRecord]) -> list[RoundRecord]:
    """The rounds that score the global model which they are the start of: no submissions, and no models of other rounds."""
    return [record for record in records if record.task != "submit_model" and record.model.round == record.round]


def num_trained(records: Sequence[RoundRecord]) -> int:
    """How many of a job's rounds trained: they come first."""
    return sum(record.task == "train" for record in records)
