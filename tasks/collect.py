"""Ask sites for updates: one Prefect task per site, or one per slot when there are many sites; none where a site's part is a
Prefect run of its own, which says more, and costs the server enough.

What a site's script prints goes to the log of the site's task or run. Every update passes the gate as soon as it arrives, while
other sites still train.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any

from prefect import task
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun
from prefect.logging import get_run_logger
from prefect.states import Cancelled

from fedpool.errors import SiteError
from fedpool.manifest import SiteAssignment, Task
from fedpool.sites.local import Sites
from fedpool.store import Store
from fedpool.tasks.gate import Accepted, Expected, Rejected, judge
from fedpool.tensors import Digest

MAX_SITE_TASKS = 64
"""Above this many sites in a round, a task serves all sites of a slot: a Prefect task per site does not scale to thousands."""

Outcome = Accepted | Rejected | SiteError


class Turn:
    """What is known of a round once its turn has come: what to ask of the sites, and what to expect of their updates."""

    __slots__ = ("base", "deadline", "expected", "task")

    def __init__(self, task: Task, base: Digest, expected: Expected, deadline: float | None) -> None:
        self.task = task
        self.base = base
        self.expected = expected
        self.deadline = deadline


class Round:
    """What the tasks of one round share. They begin before its turn: reaching a site takes longer than a short round does."""

    # Not a dataclass and without __dict__: Prefect walks the parameters of tasks, and this is nothing for it to walk.
    __slots__ = ("number", "sites", "store", "turn")

    def __init__(self, number: int, sites: Sites, store: Store) -> None:
        self.number = number
        self.sites = sites
        self.store = store
        self.turn: asyncio.Future[Turn | None] = asyncio.get_running_loop().create_future()
        """None when the job ends before the round's turn."""


async def collect(round: Round, chosen: Sequence[str]) -> dict[str, Outcome]:
    """Have every chosen site do its part once it is the round's turn.

    Returns: site -> what came of it, once all have answered, failed or timed out; empty when the turn never came.
    """
    if round.sites.have_runs:
        parts = await asyncio.gather(*(_follow_run(round, site) for site in chosen))
        return {site: part for site, part in zip(chosen, parts, strict=True) if part is not None}
    if len(chosen) <= MAX_SITE_TASKS:
        calls = [_ask_site.with_options(task_run_name=site)(round, site) for site in chosen]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        outcomes: dict[str, Outcome] = {}
        for site, answer in zip(chosen, answers, strict=True):
            if isinstance(answer, CancelledRun):
                continue
            if isinstance(answer, BaseException) and not isinstance(answer, SiteError):
                raise answer
            assert not isinstance(answer, State), "Prefect unpacks it"
            outcomes[site] = answer
        return outcomes
    shared = _Shared(chosen)
    slots = [
        _ask_slot.with_options(task_run_name=f"slot {slot + 1}")(round, shared) for slot in range(round.sites.num_slots)
    ]
    outcomes = {}
    for part in await asyncio.gather(*slots):
        outcomes |= part
    return outcomes


class _Shared:
    """Sites that slots take from in turn, so that a slow site holds up its own slot only."""

    __slots__ = ("_left",)

    def __init__(self, sites: Sequence[str]) -> None:
        self._left: Iterator[str] = iter(sites)

    def take(self) -> str | None:
        return next(self._left, None)


async def _part(round: Round, site: str) -> Outcome | None:
    """One site's part of the round; None when the round's turn never came. Raises `SiteError` when the site fails."""
    await round.sites.announce(site, round.number)
    turn = await asyncio.shield(round.turn)
    return None if turn is None else await _ask(round, turn, site)


async def _follow_run(round: Round, site: str) -> Outcome | None:
    """One site's part of the round, where it is a run of its own; a site that fails is in the log of the round."""
    try:
        return await _part(round, site)
    except SiteError as error:
        get_run_logger().error("%s", error)
        return error


@task(persist_result=False)
async def _ask_site(round: Round, site: str) -> Outcome | State[Any]:
    """One site's part of the round; the task fails when the site does."""
    outcome = await _part(round, site)
    return Cancelled(message="the job ended before this round's turn") if outcome is None else outcome


@task(persist_result=False)
async def _ask_slot(round: Round, shared: _Shared) -> dict[str, Outcome]:
    """The parts of as many sites as this slot gets to; a site that fails is in the log and in the round's record."""
    logger = get_run_logger()
    outcomes: dict[str, Outcome] = {}
    turn = await asyncio.shield(round.turn)
    while turn is not None and (site := shared.take()) is not None:
        try:
            outcomes[site] = await _ask(round, turn, site)
        except SiteError as error:
            logger.error("%s", error)
            outcomes[site] = error
    return outcomes


async def _ask(round: Round, turn: Turn, site: str) -> Outcome:
    logger = get_run_logger()
    assignment = SiteAssignment(
        site=site,
        round=round.number,
        task=turn.task,
        base_sha256=turn.base.sha256,
        base_size=turn.base.size,
        timeout_s=None if turn.deadline is None else max(0.0, turn.deadline - time.monotonic()),
    )
    delivery = await round.sites.perform(
        assignment, deadline=turn.deadline, log=lambda line: logger.info("%s: %s", site, line)
    )
    outcome = await asyncio.to_thread(judge, round.store, site, delivery.manifest, turn.expected, delivery.inspection)
    if isinstance(outcome, Rejected):
        logger.warning("%s: update rejected (%s): %s", site, outcome.code, outcome.reason)
    return outcome
