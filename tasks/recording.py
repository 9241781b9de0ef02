"""Builds a round's record from the outcomes of asking its sites, late updates, and the results."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedpool.messages import Described, Task
from fedpool.model import NUM_EVAL_EXAMPLES, NUM_STEPS
from fedpool.recipe import SERVER
from fedpool.tasks.arithmetic import CURRENT, Arithmetic
from fedpool.tasks.gate import Accepted, Arrival, Failed, Late, Outcome, Probed, Rejected
from fedpool.tasks.metrics import denominators, mean_metrics
from fedpool.tasks.record import (
    RECORD_PROTOCOL,
    AcceptedEntry,
    FailedEntry,
    LateAcceptedEntry,
    LateEntry,
    LateProbedEntry,
    LateRejectedEntry,
    NotAskedEntry,
    ProbedEntry,
    RejectedEntry,
    RoundRecord,
    SubmittedModel,
    Timings,
    WhoseModel,
    round_ms,
)
from fedpool.tensors import Digest


def round_record(
    *,
    job_id: str,
    round: int,
    task: Task,
    outcomes: Collection[Outcome],
    arrivals: Collection[Arrival] = (),
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
    virtual_time: float | None = None,
    arithmetic: Arithmetic = CURRENT,
    filters: tuple[Described, ...] = (),
) -> RoundRecord:
    """The record of a round.

    Args:
        outcomes: one for each time that a site was asked.
        arrivals: late updates of earlier rounds.
        not_asked: site -> why the round didn't ask it.
        known_weights: site -> weight of its last training update, for scores that come without one.
        owner: of the round's global model.
        origin: the round that starts from that model; for a site's model, the round in which it was
            submitted; None: this round.
        base, following, state, models, previous_sha256, timings, virtual_time, filters: see
            `RoundRecord`.
        arithmetic: of the job.
    """
    ordered = arithmetic.by_site(sorted(outcomes, key=lambda outcome: outcome.attempt), lambda outcome: outcome.site)
    accepted = [_accepted(outcome, known_weights, arithmetic) for outcome in ordered if isinstance(outcome, Accepted)]
    came = arithmetic.by_site(sorted(arrivals, key=lambda came: came.round), lambda came: came.outcome.site)
    without = not_asked or {}
    return RoundRecord(
        protocol=RECORD_PROTOCOL,
        job_id=job_id,
        round=round,
        task=task,
        sites=tuple(arithmetic.ordered({outcome.site for outcome in ordered} | set(without))),
        accepted=tuple(accepted),
        rejected=tuple(RejectedEntry(**_rejected(outcome)) for outcome in ordered if isinstance(outcome, Rejected)),
        failed=tuple(
            FailedEntry(site=outcome.site, attempt=outcome.attempt, cause=outcome.cause, away=outcome.away)
            for outcome in ordered
            if isinstance(outcome, Failed)
        ),
        probed=tuple(ProbedEntry(**_probed(outcome)) for outcome in ordered if isinstance(outcome, Probed)),
        late=tuple(
            LateEntry(site=outcome.site, attempt=outcome.attempt) for outcome in ordered if isinstance(outcome, Late)
        ),
        late_accepted=tuple(
            LateAcceptedEntry(
                **_accepted(one.outcome, {}, arithmetic).model_dump(), round=one.round, staleness=round - one.round
            )
            for one in came
            if isinstance(one.outcome, Accepted)
        ),
        late_rejected=tuple(
            LateRejectedEntry(**_rejected(one.outcome), round=one.round)
            for one in came
            if isinstance(one.outcome, Rejected)
        ),
        late_probed=tuple(
            LateProbedEntry(**_probed(one.outcome), round=one.round) for one in came if isinstance(one.outcome, Probed)
        ),
        not_asked=tuple(NotAskedEntry(site=site, reason=without[site]) for site in arithmetic.ordered(without)),
        metrics=mean_metrics((entry.metrics_weight, entry.metrics) for entry in accepted),
        denominators=denominators((entry.metrics_weight, entry.metrics) for entry in accepted),
        logged=mean_metrics((entry.weight, entry.logged) for entry in accepted),
        timings=timings,
        virtual_time=virtual_time,
        model=WhoseModel(owner=owner, round=round if origin is None else origin),
        base=base,
        next_global=following,
        state=state,
        models=None if models is None else tuple(models),
        filters=filters,
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


def _rejected(outcome: Rejected) -> dict[str, Any]:
    return {
        "site": outcome.site,
        "attempt": outcome.attempt,
        "sha256": outcome.manifest.sha256 if outcome.manifest else None,
        "manifest_sha256": outcome.manifest_sha256,
        "code": outcome.code,
        "reason": outcome.reason,
    }


def _probed(outcome: Probed) -> dict[str, Any]:
    return {
        "site": outcome.site,
        "attempt": outcome.attempt,
        "sha256": outcome.update.manifest.sha256,
        "manifest_sha256": outcome.update.manifest_sha256,
    }
