"""Asks sites for updates: one Prefect task per site, or per slot if there are many sites.

If a site's part has its own Prefect run, there is no task: the run says more, and costs the server
enough.

A script's output goes to the log of the site's task or run. Every update passes the gate as soon as
it arrives, while other sites still train. A round that closes leaves the remaining sites alone.
"""

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from prefect import task
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun
from prefect.logging import get_run_logger
from prefect.states import Cancelled

from fedpool.errors import IntegrityError, SiteError
from fedpool.messages import SiteAssignment
from fedpool.sites.site_round import read_delivery
from fedpool.sites.sites import Sites
from fedpool.storable import storable
from fedpool.store import Store
from fedpool.tasks.answers import Again, Answers, Asked, Turn
from fedpool.tasks.events import emit_rejected
from fedpool.tasks.gate import Accepted, Failed, Late, Outcome, Rejected, judge
from fedpool.tasks.observer import Observer, tell_logged
from fedpool.tasks.virtual_round import VirtualClock

MAX_SITE_TASKS = 64
"""With more sites, a task serves a slot: Prefect tasks don't scale to thousands of sites."""

T = TypeVar("T")


class Round:
    """The state that the tasks of one round share.

    The tasks start before the round's turn, because reaching a site takes longer than a short
    round.

    Args:
        retries: how often to ask a lost site again at once.
        patience_s: how long to wait for a site that is lost or unreachable.
        asked: earlier attempts: those of a previous coordinator, or of this one before it retried
            the round.
        observer: gets the values that sites have logged.
        clock: of a simulation in virtual time.
    """

    # Not a dataclass and without __dict__: Prefect walks the parameters of tasks, and must not walk
    # this.
    __slots__ = ("answers", "asked", "clock", "number", "observer", "patience_s", "retries", "sites", "store", "turn")

    def __init__(
        self,
        number: int,
        sites: Sites,
        store: Store,
        *,
        retries: int,
        patience_s: float,
        asked: Mapping[str, Asked] | None = None,
        observer: Observer,
        clock: VirtualClock | None = None,
    ) -> None:
        self.clock = clock
        self.number = number
        self.sites = sites
        self.store = store
        self.retries = retries
        self.patience_s = patience_s
        self.asked = asked or {}
        self.observer = observer
        self.turn: asyncio.Future[Turn | None] = asyncio.get_running_loop().create_future()
        """None if the job ends before the round's turn."""
        self.answers: Answers | None = None

    def begin(self, turn: Turn | None) -> None:
        """The round's turn has come; None: it never will."""
        if turn is not None:
            self.answers = Answers(time.monotonic(), turn.quorum, turn.probes)
            if self.clock is not None:
                self.clock.begin(self.number, turn, self.answers)
        self.turn.set_result(turn)

    def end(self) -> None:
        """The round stops waiting."""
        if self.answers is not None:
            self.answers.end()


async def collect(round: Round, chosen: Sequence[str]) -> list[Outcome]:
    """Have every chosen site do its part once the round's turn has come.

    Returns: the outcomes, once every site has answered, failed or timed out, or the round has
    closed. Empty if the turn never came.
    """
    # In virtual time, no site waits in a slot's queue for another to end: `Sites` manages the
    # slots.
    if round.sites.traits.have_runs or (round.clock is not None and len(chosen) > MAX_SITE_TASKS):
        calls: list[Coroutine[Any, Any, Any]] = [_follow_run(round, site) for site in chosen]
    elif len(chosen) <= MAX_SITE_TASKS:
        calls = [_ask_site.with_options(task_run_name=site)(round, site) for site in chosen]
    else:
        shared = _Shared(chosen)
        calls = [
            _ask_slot.with_options(task_run_name=f"slot {slot + 1}")(round, shared)
            for slot in range(round.sites.num_slots)
        ]
    for answer in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(answer, BaseException) and not isinstance(answer, SiteError | CancelledRun):
            raise answer
    return [] if round.answers is None else round.answers.outcomes


class _Shared:
    """Sites that slots take one by one, so a slow site blocks only its own slot."""

    __slots__ = ("_left",)

    def __init__(self, sites: Sequence[str]) -> None:
        self._left: Iterator[str] = iter(sites)

    def take(self) -> str | None:
        return next(self._left, None)


async def _part(round: Round, site: str) -> bool:
    """One site's part of the round; False if its turn never came. Raises its `SiteError`."""
    before = round.asked.get(site, Asked(0, answered=False))
    attempt = before.attempt
    if not before.answered:
        with contextlib.suppress(SiteError):  # it is asked again at the round's turn, and the outcome of that is noted
            while not await round.sites.announce(site, round.number, attempt):
                attempt += 1
    turn = await asyncio.shield(round.turn)
    if turn is None or site not in turn.sites:
        return False
    assert round.answers is not None, "begin() comes first"
    if round.clock is None:
        await ask_site(round, turn, site, attempt, round.answers)
    else:
        await round.clock.ask(site, attempt, turn, partial(ask_site, round, turn, site, attempt))
    return True


async def _follow_run(round: Round, site: str) -> None:
    """One site's part of the round, if it has its own run. A failure goes to the round's log."""
    try:
        await _part(round, site)
    except SiteError as error:
        get_run_logger().error("%s", error)


@task(persist_result=False)
async def _ask_site(round: Round, site: str) -> State[Any] | None:
    """One site's part of the round. The task fails if the site does."""
    came = await _part(round, site)
    return (
        None
        if came
        else Cancelled(message="the job ended before this round's turn, or the round did not draw this site")
    )


@task(persist_result=False)
async def _ask_slot(round: Round, shared: _Shared) -> None:
    """The parts of the sites that this slot takes. Failures go to the log and the record."""
    turn = await asyncio.shield(round.turn)
    while turn is not None and (site := shared.take()) is not None:
        if site not in turn.sites:
            continue
        try:
            assert round.answers is not None, "begin() comes first"
            await ask_site(round, turn, site, round.asked[site].attempt if site in round.asked else 0, round.answers)
        except SiteError as error:
            get_run_logger().error("%s", error)


async def ask_site(round: Round, turn: Turn, site: str, attempt: int, answers: Answers) -> None:
    """Ask a site until it answers, and note the outcomes. Raises its `SiteError` if it gives up."""
    logger = get_run_logger()
    again = Again(round.retries, round.patience_s if round.sites.traits.come_back else 0.0)
    while True:
        try:
            outcome = await _unless(answers.closed, _answer(round, turn, site, attempt)) or Late(site, attempt)
        except SiteError as error:
            answers.add(Failed(site, attempt, error.cause, away=error.away))
            pause_s = again.after_loss(time.monotonic()) if error.lost else None
            if pause_s is None or (turn.deadline is not None and time.monotonic() + pause_s >= turn.deadline):
                raise
            logger.warning("%s: asking again%s: %s", site, f" in {pause_s:g} s" if pause_s else "", error.cause)
            await _unless(answers.closed, asyncio.sleep(pause_s))
            attempt += 1
        else:
            answers.add(outcome)
            if isinstance(outcome, Rejected):
                logger.warning("%s: update rejected (%s): %s", site, outcome.code, outcome.reason)
                emit_rejected(turn.expected, outcome)
            return


async def _answer(round: Round, turn: Turn, site: str, attempt: int) -> Accepted | Rejected:
    """Have a site do its part, unless it has already, and judge the result."""
    logger = get_run_logger()
    expected = turn.expected
    before = round.asked.get(site)
    try:
        if before == Asked(attempt, answered=True):
            delivery = await asyncio.to_thread(read_delivery, round.store, expected.job_id, round.number, site, attempt)
        else:
            assignment = SiteAssignment(
                site=site,
                round=round.number,
                attempt=attempt,
                task=turn.task,
                base_sha256=turn.base.sha256,
                base_size=turn.base.size,
                state_sha256=turn.state.sha256 if turn.state else None,
                state_size=turn.state.size if turn.state else 0,
                used=turn.used.get(site),
                timeout_s=None if turn.deadline is None else max(0.0, turn.deadline - time.monotonic()),
            )
            delivery = await round.sites.perform(
                assignment,
                deadline=turn.deadline,
                patience_s=round.patience_s,
                log=lambda line: logger.info("%s: %s", site, line),
            )
    except IntegrityError as error:
        return Rejected(site, attempt, None, None, "manifest", storable(str(error)))
    tell_logged(round.observer, round.store, site, round.number, attempt, expected.job_id, delivery)
    return await asyncio.to_thread(judge, round.store, site, attempt, delivery, expected)


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of some work; None, with the work cancelled, if the event comes first."""
    working, coming = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({working, coming}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        left = [future for future in (working, coming) if future.cancel()]
        await asyncio.gather(*left, return_exceptions=True)
