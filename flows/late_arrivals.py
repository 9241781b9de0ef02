"""Judges the late updates of a running job that have arrived, for the round that commits next."""

import asyncio
from collections.abc import Collection

from prefect.logging import get_run_logger

from fedpool.errors import IntegrityError, StoreError
from fedpool.flows.expected import expected
from fedpool.flows.late_updates import folds
from fedpool.flows.under_way import Job
from fedpool.sites.site_round import Delivery, read_delivery
from fedpool.storable import storable
from fedpool.tasks.answers import asked_before
from fedpool.tasks.events import emit_rejected
from fedpool.tasks.expected import Expected
from fedpool.tasks.gate import Accepted, Arrival, Probed, Rejected, counting_in, judge
from fedpool.tasks.staleness import Awaited, awaited


async def late_arrivals(job: Job, number: int, probes: Collection[str]) -> list[Arrival]:
    """The late updates that a training round counts or rejects: all in the store when it closes.

    Args:
        number: of the round.
        probes: sites in quarantine.
    """
    if not folds(job.recipe):
        return []
    found = []
    for owed in awaited(job.records):
        if job.clock is not None and job.clock.owes(owed.site, owed.round):
            continue  # in virtual time, it is still working even if its update is there
        arrival = await asyncio.to_thread(_judged, job, number, owed, probes)
        if arrival is not None:
            _tell(job, number, arrival)
            found.append(arrival)
    return found


def name_dropped(job: Job) -> None:
    """At the job's end, log late updates that arrived after the last training round's commit."""
    if not folds(job.recipe):
        return
    try:
        for owed in awaited(job.records):
            if any(job.store.exists(job.paths.manifest(owed.round, owed.site, attempt)) for attempt in owed.attempts):
                get_run_logger().warning(
                    "%s's update of round %d arrived after the last training round: it stays in the store, and is not used",
                    owed.site,
                    owed.round,
                )
    except (OSError, StoreError) as error:  # the job is over, and its result is written
        get_run_logger().warning("could not look for late updates after the last training round: %s", error)


def late_expected(job: Job, round: int) -> Expected:
    """The requirements on an update of an earlier round: those of its own round."""
    head = job.records[round].base
    base = job.global_model(round, head)
    return expected(job.recipe, job.strategy, job.job_id, round, "train", head, base, job.holes, job.arithmetic)


def _judged(job: Job, number: int, owed: Awaited, probes: Collection[str]) -> Arrival | None:
    """A late update as the gate judges it against its own round; None if it hasn't arrived."""
    for attempt in _attempts(job, owed):
        try:
            delivery = _delivered(job, owed, attempt)
        except FileNotFoundError:
            continue
        if isinstance(delivery, Rejected):
            return Arrival(owed.round, delivery)
        wanted = late_expected(job, owed.round)
        outcome = counting_in(number, judge(job.store, owed.site, attempt, delivery, wanted), wanted)
        if isinstance(outcome, Rejected):
            emit_rejected(wanted, outcome)
        elif owed.site in probes:
            return Arrival(owed.round, Probed(outcome))
        return Arrival(owed.round, outcome)
    return None


def _attempts(job: Job, owed: Awaited) -> Collection[int]:
    """The attempts that may have brought a late update; virtual time may have added one."""
    if job.clock is None:
        return owed.attempts
    there = asked_before(job.store.tree(job.paths.round(owed.round)), lives_on=False).get(owed.site)
    return () if there is None or not there.answered else (there.attempt,)


def _delivered(job: Job, owed: Awaited, attempt: int) -> Delivery | Rejected:
    try:
        return read_delivery(job.store, job.job_id, owed.round, owed.site, attempt)
    except IntegrityError as error:
        return Rejected(owed.site, attempt, None, None, "manifest", storable(str(error)))


def _tell(job: Job, number: int, arrival: Arrival) -> None:
    logger, outcome, site = get_run_logger(), arrival.outcome, arrival.outcome.site
    if isinstance(outcome, Rejected):
        logger.warning(
            "%s: late update of round %d rejected (%s): %s", site, arrival.round, outcome.code, outcome.reason
        )
    elif isinstance(outcome, Accepted):
        logger.info(
            "%s's update of round %d arrived late: it counts in round %d (staleness %d)",
            site,
            arrival.round,
            number,
            outcome.staleness,
        )
