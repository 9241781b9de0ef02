"""Ask sites for updates: one Prefect task per site, or one per slot when there are many sites; none where a site's part is a
Prefect run of its own, which says more, and costs the server enough.

What a site's script prints goes to the log of the site's task or run. Every update passes the gate as soon as it arrives, while
other sites still train. A round that closes leaves the sites that have not answered to themselves.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from prefect import task
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun
from prefect.logging import get_run_logger
from prefect.states import Cancelled

from fedpool.errors import IntegrityError, SiteError
from fedpool.manifest import SiteAssignment, Task, Used
from fedpool.sites.site_round import read_delivery
from fedpool.sites.sites import Sites
from fedpool.storable import storable
from fedpool.store import Store
from fedpool.tasks.events import emit_rejected
from fedpool.tasks.gate import Accepted, Expected, Failed, Late, Outcome, Probed, Rejected, judge
from fedpool.tasks.quorum import Quorum
from fedpool.tensors import Digest

MAX_SITE_TASKS = 64
"""Above this many sites in a round, a task serves all sites of a slot: a Prefect task per site does not scale to thousands."""

_OF_A_SITE = re.compile(
    r"(attempts/(?P<attempt>[1-9]\d*)/)?(sites/(?P<site>[^/]+)/(?P<object>[^/]+)|assignments/(?P<asked>[^/]+)\.json)"
)
T = TypeVar("T")


class Turn:
    """What is known of a round once its turn has come: what to ask of the sites, and what to expect of their updates."""

    __slots__ = ("base", "deadline", "expected", "probes", "quorum", "sites", "state", "task", "used")

    def __init__(
        self,
        task: Task,
        base: Digest,
        expected: Expected,
        *,
        state: Digest | None,
        deadline: float | None,
        quorum: Quorum,
        sites: Collection[str],
        probes: Collection[str],
        used: Mapping[str, Used] | None = None,
    ) -> None:
        self.task = task
        self.base = base
        self.expected = expected
        self.state = state
        """Of the strategy, for one that sites need to see."""
        self.deadline = deadline
        self.quorum = quorum
        self.sites = frozenset(sites)
        self.probes = frozenset(probes)
        """Those of the sites that are in quarantine: what they send is judged, and not used."""
        self.used = used or {}
        """site -> its last update that counted, for a strategy that sites need to see."""


class Answers:
    """What has come of asking the sites of a round so far; `closed` is set once the round waits for no more."""

    __slots__ = ("_accepted_s", "_began", "_closing", "_probes", "_quorum", "closed", "outcomes")

    def __init__(self, began: float, quorum: Quorum, probes: Collection[str]) -> None:
        self.outcomes: list[Outcome] = []
        self.closed = asyncio.Event()
        self._began = began
        self._quorum = quorum
        self._probes = probes
        self._accepted_s: list[float] = []
        self._closing: asyncio.TimerHandle | None = None

    def add(self, outcome: Outcome) -> None:
        """Note an outcome; an update that comes when the round has closed is late, however good."""
        if isinstance(outcome, Accepted) and outcome.site in self._probes:
            outcome = Probed(outcome)
        elif isinstance(outcome, Accepted):
            if self.closed.is_set():
                outcome = Late(outcome.site, outcome.attempt)
            else:
                self._note_accepted()
        self.outcomes.append(outcome)

    def end(self) -> None:
        """Forget the time at which the round would close."""
        if self._closing is not None:
            self._closing.cancel()

    def _note_accepted(self) -> None:
        now_s = time.monotonic() - self._began
        self._accepted_s.append(now_s)
        closes_s = self._quorum.closes_after(self._accepted_s)
        if closes_s is not None and closes_s <= now_s:
            self.closed.set()
        elif closes_s is not None and self._closing is None:
            self._closing = asyncio.get_running_loop().call_later(closes_s - now_s, self.closed.set)


@dataclass(frozen=True, slots=True)
class Asked:
    """How a site is asked in a round that was begun before.

    Attributes:
        attempt: by which attempt.
        answered: whether the manifest of its update is in the store already.
    """

    attempt: int
    answered: bool


def asked_before(found: Iterable[str], *, lives_on: bool) -> dict[str, Asked]:
    """site -> how to go on with it, in a round that an earlier coordinator has begun.

    Args:
        found: paths of what lies in the round's folder, relative to it.
        lives_on: whether sites that were asked may still be at work, though the coordinator was lost.
    """
    attempts: dict[str, int] = {}
    answered: set[tuple[str, int]] = set()
    for path in found:
        if match := _OF_A_SITE.fullmatch(path):
            site, attempt = match["site"] or match["asked"], int(match["attempt"] or 0)
            attempts[site] = max(attempt, attempts.get(site, 0))
            if match["object"] == "update.json":
                answered.add((site, attempt))
    return {
        site: Asked(attempt, True)
        if (site, attempt) in answered
        else Asked(attempt if lives_on else attempt + 1, False)
        for site, attempt in attempts.items()
    }


class Round:
    """What the tasks of one round share. They begin before its turn: reaching a site takes longer than a short round does.

    Args:
        retries: how often a site that is lost is asked again at once.
        patience_s: how long a site that is lost or cannot be reached is waited for.
        asked: what came before: an earlier coordinator's attempts, or this one's before the round is tried again.
    """

    # Not a dataclass and without __dict__: Prefect walks the parameters of tasks, and this is nothing for it to walk.
    __slots__ = ("answers", "asked", "number", "patience_s", "retries", "sites", "store", "turn")

    def __init__(
        self,
        number: int,
        sites: Sites,
        store: Store,
        *,
        retries: int,
        patience_s: float,
        asked: Mapping[str, Asked] | None = None,
    ) -> None:
        self.number = number
        self.sites = sites
        self.store = store
        self.retries = retries
        self.patience_s = patience_s
        self.asked = asked or {}
        self.turn: asyncio.Future[Turn | None] = asyncio.get_running_loop().create_future()
        """None when the job ends before the round's turn."""
        self.answers: Answers | None = None

    def begin(self, turn: Turn | None) -> None:
        """The round's turn has come; None when it never will."""
        if turn is not None:
            self.answers = Answers(time.monotonic(), turn.quorum, turn.probes)
        self.turn.set_result(turn)

    def end(self) -> None:
        """The round waits for no more."""
        if self.answers is not None:
            self.answers.end()


async def collect(round: Round, chosen: Sequence[str]) -> list[Outcome]:
    """Have every chosen site do its part once it is the round's turn.

    Returns: what came of it, once all have answered, failed or timed out, or the round has closed; empty when the turn never
        came.
    """
    if round.sites.traits.have_runs:
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
    """Sites that slots take from in turn, so that a slow site holds up its own slot only."""

    __slots__ = ("_left",)

    def __init__(self, sites: Sequence[str]) -> None:
        self._left: Iterator[str] = iter(sites)

    def take(self) -> str | None:
        return next(self._left, None)


async def _part(round: Round, site: str) -> bool:
    """One site's part of the round; False when the round's turn never came. Raises `SiteError` when the site fails."""
    before = round.asked.get(site, Asked(0, answered=False))
    attempt = before.attempt
    if not before.answered:
        with contextlib.suppress(
            SiteError
        ):  # at the round's turn it is asked all the same, and what comes of that is noted
            while not await round.sites.announce(site, round.number, attempt):
                attempt += 1
    turn = await asyncio.shield(round.turn)
    if turn is None or site not in turn.sites:
        return False
    await _ask(round, turn, site, attempt)
    return True


async def _follow_run(round: Round, site: str) -> None:
    """One site's part of the round, where it is a run of its own; a site that fails is in the log of the round."""
    try:
        await _part(round, site)
    except SiteError as error:
        get_run_logger().error("%s", error)


@task(persist_result=False)
async def _ask_site(round: Round, site: str) -> State[Any] | None:
    """One site's part of the round; the task fails when the site does."""
    came = await _part(round, site)
    return (
        None if came else Cancelled(message="the job ended before this round's turn, or the round's sites were others")
    )


@task(persist_result=False)
async def _ask_slot(round: Round, shared: _Shared) -> None:
    """The parts of as many sites as this slot gets to; a site that fails is in the log and in the round's record."""
    turn = await asyncio.shield(round.turn)
    while turn is not None and (site := shared.take()) is not None:
        if site not in turn.sites:
            continue
        try:
            await _ask(round, turn, site, round.asked[site].attempt if site in round.asked else 0)
        except SiteError as error:
            get_run_logger().error("%s", error)


async def _ask(round: Round, turn: Turn, site: str, attempt: int) -> None:
    """Note what comes of asking a site; one that is lost is asked again. Raises `SiteError` when it fails for good."""
    logger = get_run_logger()
    answers = round.answers
    assert answers is not None, "begin() comes first"
    again = Again(round.retries, round.patience_s if round.sites.traits.come_back else 0.0)
    while True:
        try:
            outcome = await _unless(answers.closed, _answer(round, turn, site, attempt)) or Late(site, attempt)
        except SiteError as error:
            answers.add(Failed(site, attempt, error.cause, away=error.away))
            pause_s = again.after_loss(time.monotonic()) if error.lost else None
            if pause_s is None or (turn.deadline is not None and time.monotonic() + pause_s >= turn.deadline):
                raise
            logger.warning("%s is asked again%s: %s", site, f" in {pause_s:g} s" if pause_s else "", error.cause)
            await _unless(answers.closed, asyncio.sleep(pause_s))
            attempt += 1
        else:
            answers.add(outcome)
            if isinstance(outcome, Rejected):
                logger.warning("%s: update rejected (%s): %s", site, outcome.code, outcome.reason)
                emit_rejected(turn.expected, outcome)
            return


class Again:
    """When a site that was lost is asked again: at once, so often as `retries` says; then, within `patience_s` of its first loss,
    after pauses that grow, because a worker that is being restarted may lose its work more than once.
    """

    def __init__(self, retries: int, patience_s: float) -> None:
        self._retries = retries
        self._patience_s = patience_s
        self._first_loss: float | None = None
        self._pause_s = 1.0

    def after_loss(self, now: float) -> float | None:
        """Seconds to wait before the site is asked again; None when it is not.

        Args:
            now: `time.monotonic()`.
        """
        first = self._first_loss = now if self._first_loss is None else self._first_loss
        if self._retries > 0:
            self._retries -= 1
            return 0.0
        pause_s, self._pause_s = self._pause_s, 2 * self._pause_s
        return pause_s if now + pause_s - first < self._patience_s else None


async def _answer(round: Round, turn: Turn, site: str, attempt: int) -> Accepted | Rejected:
    """Have a site do its part, or find it done, and judge what came of it."""
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
    return await asyncio.to_thread(judge, round.store, site, attempt, delivery, expected)


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of some work; None, and the work given up, when the event comes first."""
    working, coming = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({working, coming}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        left = [future for future in (working, coming) if future.cancel()]
        await asyncio.gather(*left, return_exceptions=True)
