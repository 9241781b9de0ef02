"""Asking: reaching a round's sites before its turn, asking them, asking again if too few answer."""

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from prefect.logging import get_run_logger

from fedpool.checked import CheckedTensors
from fedpool.flows.choose import choose, quorum_of
from fedpool.flows.expected import expected
from fedpool.flows.plan import Step, asks_everyone
from fedpool.flows.redo import go_on_in_virtual_time
from fedpool.flows.under_way import Job
from fedpool.recipe import SERVER
from fedpool.site_order import in_order
from fedpool.tasks.absence import unasked
from fedpool.tasks.answers import Asked, Turn, asked_before
from fedpool.tasks.collect import collect
from fedpool.tasks.expected import Expected
from fedpool.tasks.gate import Accepted, Outcome
from fedpool.tasks.publish import copy_model
from fedpool.tensors import Digest


@dataclass(frozen=True, slots=True)
class Asking:
    """The details of a round from its turn on.

    Attributes:
        head: digest of its global model.
        base: that model.
        chosen: its sites.
        probes: those of its sites that are in quarantine.
        not_asked: site -> why the round doesn't ask it.
        started: `time.monotonic()` of its turn.
    """

    number: int
    step: Step
    head: Digest
    base: CheckedTensors
    wanted: Expected
    chosen: tuple[str, ...]
    probes: frozenset[str]
    not_asked: Mapping[str, str]
    started: float


async def ask(job: Job, number: int) -> tuple[Asking | None, list[Outcome]]:
    """Reach the round's sites as far as they are known, and ask them at its turn.

    Returns: None and no outcomes if the turn never comes.
    """
    recipe, names = job.recipe, job.sites.names
    everyone = asks_everyone(recipe, job.records, number)
    ahead, _ = choose(recipe, job.strategy, job.ledger, names, number, everyone=everyone)
    before: Mapping[str, Asked] = {}
    if number == job.resumed_at:
        found = await asyncio.to_thread(job.store.tree, job.paths.round(number))
        before = asked_before(found, lives_on=job.sites.traits.outlive)
    round = job.round(number, before)
    collecting = asyncio.create_task(collect(round, ahead))
    asking = None
    try:
        step = await job.rounds[number].step
        if step is not None:
            asking = await _asking(job, number, step)
            if number == job.resumed_at and job.clock is not None:
                await go_on_in_virtual_time(job, job.clock)
            now = [site for site in asking.chosen if site not in asking.not_asked]
            round.begin(_turn(job, asking, now, asking.probes))
            await collect(round, in_order(set(now) - set(ahead)))
    finally:
        if not round.turn.done():
            round.begin(None)
        outcomes = await collecting
        round.end()
    return asking, outcomes


async def _asking(job: Job, number: int, step: Step) -> Asking:
    """The details of a round whose turn has come."""
    started = time.monotonic()
    head = step.model or job.ledger.head
    await asyncio.to_thread(_have_model, job, number, step)
    base = await asyncio.to_thread(partial(job.global_model, number, head, submitted=step.owner != SERVER))
    wanted = expected(job.recipe, job.strategy, job.job_id, number, step.task, head, base, job.holes, job.arithmetic)
    chosen, probes = choose(
        job.recipe, job.strategy, job.ledger, job.sites.names, number, everyone=step.everyone, task=step.task
    )
    not_asked = await unasked(job.records, job.sites, chosen, probes=probes, needed=step.min_answers)
    return Asking(number, step, head, base, wanted, chosen, probes, not_asked, started)


def _turn(job: Job, asking: Asking, sites: Collection[str], probes: Collection[str], num_there: int = 0) -> Turn:
    """The turn of a round: what to ask its sites now.

    Args:
        probes: those of the sites that are in quarantine.
        num_there: number of updates that the round already has.
    """
    step, timeout_s = asking.step, job.recipe.round_timeout
    shared = job.strategy.shared and step.task == "train"
    job.counted.follow(job.records)
    return Turn(
        step.task,
        asking.head,
        asking.wanted,
        state=job.ledger.state if shared else None,
        deadline=None if timeout_s is None else time.monotonic() + timeout_s,
        quorum=quorum_of(job.recipe, step, sites, num_there),
        sites=sites,
        probes=probes,
        used=job.counted.used(sites) if shared else {},
    )


async def ask_until_enough(job: Job, asking: Asking, outcomes: list[Outcome]) -> tuple[Asking, list[Outcome]]:
    """Ask the missing sites again, up to `round_retries` times, while there are too few updates."""
    retries = job.recipe.round_retries
    while len(accepted(outcomes)) < asking.step.min_answers and retries and not job.sites.cancelled:
        retries -= 1
        # Now ask the sites that were left out, too.
        left_out = {site: reason for site, reason in asking.not_asked.items() if site in asking.probes}
        asking = replace(asking, not_asked=left_out)
        outcomes = [*outcomes, *await _ask_again(job, asking, outcomes)]
    return asking, outcomes


async def _ask_again(job: Job, asking: Asking, before: Collection[Outcome]) -> list[Outcome]:
    """Ask the sites whose updates are missing once more; accepted updates stay."""
    there = {outcome.site for outcome in accepted(before)}
    attempts = {outcome.site: outcome.attempt for outcome in before}  # the last of a site wins
    missing = in_order(set(asking.chosen) - asking.probes - there)
    get_run_logger().warning("round %d has too few updates: asking %s again", asking.number, ", ".join(missing[:8]))
    again = {site: Asked(attempts[site] + 1, False) for site in missing if site in attempts}
    round = job.round(asking.number, again)
    round.begin(_turn(job, asking, missing, (), len(there)))
    try:
        return await collect(round, missing)
    finally:
        round.end()


def _have_model(job: Job, number: int, step: Step) -> None:
    """Make sure that the round's global model exists: for a submission, a copy of the previous
    round's.

    Raises:
        IntegrityError: it isn't the committed one.
    """
    if step.task != "submit_model":
        return  # the round that produced it has written it
    path, head = job.paths.global_model(number), job.ledger.head
    if job.store.exists(path):  # an earlier coordinator has written it, and sites may be reading it
        job.committed.checked(path, head)
    else:
        copy_model(job.store, job.paths.global_model(step.origin), head, path)


def accepted(outcomes: Iterable[Outcome]) -> list[Accepted]:
    """The updates that may touch the sum."""
    return [outcome for outcome in outcomes if isinstance(outcome, Accepted)]
