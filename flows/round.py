"""`federated_round`: one global step, one flow run, named "<job name> round 3".

The run is created (`fedpool.flows.round_run`) while an earlier round still trains, because that
takes as long as a short round. At its turn, the round asks the chosen sites and passes every update
through the gate as it arrives. It closes when all sites have answered, failed or exceeded
`round_timeout`, or when the quorum rule says so. Then it aggregates, writes the next global model,
and finally `round.json`, which commits the round. With fewer than `min_clients` accepted updates,
it asks the missing sites again, up to `round_retries` times, and then fails with the cause for
every missing site. Caches and persists nothing.
"""

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Cancelled

from fedpool.errors import RoundError
from fedpool.filters import described
from fedpool.flows.ask import Asking, accepted, ask, ask_until_enough
from fedpool.flows.late_arrivals import late_arrivals
from fedpool.flows.late_updates import folds
from fedpool.flows.plan import unscored_best
from fedpool.flows.under_way import Job
from fedpool.storable import storable
from fedpool.tasks.absence import how_to_resume
from fedpool.tasks.aggregate import Aggregated, aggregate
from fedpool.tasks.causes import causes, uncounted
from fedpool.tasks.gate import Accepted, Arrival, Late, Outcome, Rejected
from fedpool.tasks.publish import copy_model, publish_submitted
from fedpool.tasks.record import RoundRecord, SubmittedModel, Timings, known_weights, round_ms
from fedpool.tasks.recording import round_record
from fedpool.tasks.retention import drop_updates, outdated
from fedpool.tasks.weighing import UpdateChanged

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Made:
    """The results of a round: the next model, or the models that sites have submitted."""

    outcomes: Sequence[Outcome]
    arrivals: Sequence[Arrival] = ()
    following: Aggregated | None = None
    models: Sequence[SubmittedModel] | None = None


@flow(name="federated-round", validate_parameters=False, persist_result=False)
async def federated_round(job: Job, number: int) -> State[Any] | None:
    """Wait for the round's turn, run it and commit it to the job's ledger.

    Returns: a Cancelled state if the job ended before the round's turn.

    Raises:
        ModelChanged: the global model, or the strategy's state, isn't the committed one.
        RoundError: the round has fewer accepted updates than its step needs.
    """
    asking, outcomes = await ask(job, number)
    if asking is None:
        return Cancelled(message="the job ended before this round's turn")
    asking, outcomes = await ask_until_enough(job, asking, outcomes)
    trained = time.monotonic()
    made = await _make(job, asking, outcomes)
    if job.sites.traits.simulated:  # its sites trust the model's file, and take no hash of what they read
        await asyncio.to_thread(asking.base.check)
    record = _recorded(job, asking, made, trained)
    _check(job, asking, record)
    digest = await asyncio.to_thread(job.store.write_json, job.paths.record(number), record.as_json())
    job.ledger = job.ledger.advance(record, digest.sha256)
    job.observer.committed(record)
    job.rounds[number].committed.set()
    await _tidy(job, number, made.outcomes, made.arrivals)  # the next round has started, so this doesn't delay it
    return None


async def _make(job: Job, asking: Asking, outcomes: Sequence[Outcome]) -> Made:
    """Use the updates as the task requires. An update that changed after the gate is rejected."""
    if asking.step.task == "train":
        return await _aggregate(job, asking, outcomes)
    if asking.step.task == "submit_model":
        return await _submit(job, asking, outcomes)
    return Made(outcomes)


async def _aggregate(job: Job, asking: Asking, outcomes: Sequence[Outcome]) -> Made:
    number, arrivals = asking.number, await late_arrivals(job, asking.number, asking.probes)
    while len(accepted(outcomes)) >= job.recipe.min_clients:
        try:
            following = await asyncio.to_thread(
                aggregate,
                job.strategy,
                store=job.store,
                before=await asyncio.to_thread(job.before, number, asking.base),
                updates=[*accepted(outcomes), *accepted(came.outcome for came in arrivals)],
                factors=job.recipe.aggregation_weights,
                target=job.paths.global_model(number + 1),
                state_target=job.paths.state(number),
                arithmetic=job.arithmetic,
            )
        except UpdateChanged as changed:
            outcomes = [_unless_changed(outcome, changed) for outcome in outcomes]
            arrivals = [replace(came, outcome=_unless_changed(came.outcome, changed)) for came in arrivals]
        else:
            _note(job, following)
            return Made(outcomes, arrivals, following)
    return Made(outcomes, arrivals)


def _note(job: Job, following: Aggregated) -> None:
    """Keep the tags of what the next round reads."""
    for digest, tags in ((following.model, following.model_tags), (following.state, following.state_tags)):
        if digest is not None and tags is not None:
            job.committed.note(digest, tags)


async def _submit(job: Job, asking: Asking, outcomes: Sequence[Outcome]) -> Made:
    best = unscored_best(job.recipe, job.records, job.sites.names)
    models, lost = await asyncio.to_thread(_publish, job, asking, best, accepted(outcomes))
    for of_site in lost:
        outcomes = [_unless_changed(outcome, of_site) for outcome in outcomes]
    if without := [outcome.site for outcome in accepted(outcomes) if outcome.tensors is None]:
        get_run_logger().warning("these sites submitted no model, so there is none to score: %s", ", ".join(without))
    return Made(outcomes, models=models)


def _publish(
    job: Job, asking: Asking, best: SubmittedModel | None, submitted: Collection[Accepted]
) -> tuple[list[SubmittedModel], list[UpdateChanged]]:
    """Write the models to score as the next rounds' global models; see `publish_submitted`."""
    number, models = asking.number, [] if best is None else [best]
    if best is not None:
        source, target = job.paths.global_model(best.round), job.paths.global_model(number + 1)
        copy_model(job.store, source, best.digest, target)
    of_sites, lost = publish_submitted(
        job.store, job.paths, asking.base, tuple(submitted), number + 1 + len(models), job.arithmetic
    )
    return models + of_sites, lost


def _recorded(job: Job, asking: Asking, made: Made, trained: float) -> RoundRecord:
    """The record of a round that ends now.

    Args:
        trained: `time.monotonic()` at the end of asking.
    """
    step, following, ended = asking.step, made.following, time.monotonic()
    return round_record(
        job_id=job.job_id,
        round=asking.number,
        task=step.task,
        outcomes=made.outcomes,
        arrivals=made.arrivals,
        not_asked=asking.not_asked,
        known_weights=known_weights(job.records),
        owner=step.owner,
        origin=step.origin,
        base=asking.head,
        following=following.model if following else None,
        state=following.state if following else None,
        models=made.models,
        previous_sha256=job.ledger.sha256,
        virtual_time=None if job.clock is None else job.clock.schedule.now,
        timings=Timings(
            train_s=round_ms(trained - asking.started),
            aggregate_s=round_ms(ended - trained),
            round_s=round_ms(ended - asking.started),
        ),
        arithmetic=job.arithmetic,
        filters=described(asking.wanted.filters),
    )


def _check(job: Job, asking: Asking, record: RoundRecord) -> None:
    """Log why sites are missing from a round; raise `RoundError` if it has too few updates."""
    missing = causes(record)
    if len(record.accepted) < asking.step.min_answers:
        raise RoundError(
            f"round {record.round}: {len(record.accepted)} of {len(asking.chosen)} sites sent an update that was accepted, "
            f"but min_clients is {job.recipe.min_clients}\n{missing}{how_to_resume(record)}"
        )
    if missing:
        get_run_logger().warning("round %d continues without some sites\n%s", record.round, missing)
    if (why := uncounted(record, job.recipe.aggregation_weights)) is not None:
        get_run_logger().warning("round %d: %s", record.round, why)


async def _tidy(job: Job, number: int, outcomes: Sequence[Outcome], arrivals: Sequence[Arrival]) -> None:
    """Tidy up after the commit of a round."""
    for outcome in accepted(outcomes):
        await asyncio.to_thread(job.store.settle, job.paths.update(number, outcome.site, outcome.attempt))
    for came in arrivals:
        if isinstance(update := came.outcome, Accepted):
            await asyncio.to_thread(job.store.settle, job.paths.update(came.round, update.site, update.attempt))
    for old in outdated(job.records, job.recipe.keep_updates)[-1:]:  # older ones were dropped before
        await asyncio.to_thread(drop_updates, job.store, job.job_id, old)
    if not folds(job.recipe):
        job.late |= {(number, outcome.site, outcome.attempt) for outcome in outcomes if isinstance(outcome, Late)}
        await asyncio.to_thread(_name_late, job)


def _name_late(job: Job) -> None:
    """Log updates that arrived after their rounds had closed."""
    for key in sorted(job.late):
        round, site, attempt = key
        if job.store.exists(job.paths.manifest(round, site, attempt)):
            job.late.discard(key)
            get_run_logger().warning(
                "%s's update of round %d arrived after that round had closed: it stays in the store, and is not used",
                site,
                round,
            )


def _unless_changed(outcome: T, changed: UpdateChanged) -> T | Rejected:
    """The outcome, or a rejection if it is the update that changed after the gate accepted it."""
    if not isinstance(outcome, Accepted) or outcome.key != changed.key:
        return outcome
    get_run_logger().warning("%s: update rejected (changed): %s", changed.site, changed)
    return Rejected(
        outcome.site, outcome.attempt, outcome.manifest, outcome.manifest_sha256, "changed", storable(str(changed))
    )
