"""Ask sites for updates: one Prefect task per site, or one per slot when there are many sites.

What a site's script prints goes to the log of the site's task. Every update passes the gate as soon as it arrives, while
other sites still train.
"""

import asyncio
from collections.abc import Iterator, Sequence

from prefect import task
from prefect.logging import get_run_logger

from fedpool.errors import SiteError
from fedpool.manifest import SiteAssignment
from fedpool.sites.local import Sites
from fedpool.store import Store
from fedpool.tasks.gate import Accepted, Expected, Rejected, judge

MAX_SITE_TASKS = 64
"""Above this many sites in a round, a task serves all sites of a slot: a Prefect task per site does not scale to thousands."""

Outcome = Accepted | Rejected | SiteError


class Round:
    """What the tasks of one round share."""

    # Not a dataclass and without __dict__: Prefect walks the parameters of tasks, and this is nothing for it to walk.
    __slots__ = ("deadline", "expected", "sites", "store")

    def __init__(self, sites: Sites, store: Store, expected: Expected, deadline: float | None) -> None:
        self.sites = sites
        self.store = store
        self.expected = expected
        self.deadline = deadline


async def collect(round: Round, assignments: Sequence[SiteAssignment]) -> dict[str, Outcome]:
    """Have every site do its assignment; returns site -> what came of it, once all have answered, failed or timed out."""
    if len(assignments) <= MAX_SITE_TASKS:
        calls = [_ask_site.with_options(task_run_name=a.site)(round, a) for a in assignments]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        outcomes: dict[str, Outcome] = {}
        for assignment, answer in zip(assignments, answers, strict=True):
            if isinstance(answer, BaseException) and not isinstance(answer, SiteError):
                raise answer
            outcomes[assignment.site] = answer
        return outcomes
    shared = _Shared(assignments)
    slots = [
        _ask_slot.with_options(task_run_name=f"slot {slot + 1}")(round, shared) for slot in range(round.sites.num_slots)
    ]
    outcomes = {}
    for part in await asyncio.gather(*slots):
        outcomes |= part
    return outcomes


class _Shared:
    """Assignments that slots take from in turn, so that a slow site holds up its own slot only."""

    __slots__ = ("_left",)

    def __init__(self, assignments: Sequence[SiteAssignment]) -> None:
        self._left: Iterator[SiteAssignment] = iter(assignments)

    def take(self) -> SiteAssignment | None:
        return next(self._left, None)


@task(persist_result=False)
async def _ask_site(round: Round, assignment: SiteAssignment) -> Outcome:
    """One site's part of the round; the task fails when the site does."""
    return await _ask(round, assignment)


@task(persist_result=False)
async def _ask_slot(round: Round, shared: _Shared) -> dict[str, Outcome]:
    """The parts of as many sites as this slot gets to; a site that fails is in the log and in the round's record."""
    logger = get_run_logger()
    outcomes: dict[str, Outcome] = {}
    while (assignment := shared.take()) is not None:
        try:
            outcomes[assignment.site] = await _ask(round, assignment)
        except SiteError as error:
            logger.error("%s", error)
            outcomes[assignment.site] = error
    return outcomes


async def _ask(round: Round, assignment: SiteAssignment) -> Outcome:
    logger = get_run_logger()
    prefix = f"{assignment.site}: "
    delivery = await round.sites.perform(
        assignment, deadline=round.deadline, log=lambda line: logger.info("%s%s", prefix, line)
    )
    outcome = await asyncio.to_thread(
        judge, round.store, assignment.site, delivery.manifest, round.expected, delivery.inspection
    )
    if isinstance(outcome, Rejected):
        logger.warning("%supdate rejected (%s): %s", prefix, outcome.code, outcome.reason)
    return outcome
