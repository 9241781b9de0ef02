"""Rounds in virtual time: sites work as fast as this machine allows, but only virtual time counts.

So `SimEnv(speeds=...)` alone decides in which order updates arrive, which sites are late and when a
round closes: the bits are the same on any machine, and nothing sleeps. The clock jumps from the end
of one site's part to the next, and waits there for its real work.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from functools import partial
from typing import Any

from fedpool.errors import SiteError
from fedpool.site_order import in_order
from fedpool.tasks.answers import Answers, Turn
from fedpool.tasks.gate import Accepted, Late, Outcome
from fedpool.tasks.quorum import Quorum
from fedpool.tasks.virtual_time import Part, Schedule

_NEVER = Quorum(min_clients=1)
"""Never closes a round: the clock decides."""

Ask = Callable[[Answers], Coroutine[Any, Any, None]]
"""Has a site do its part, and notes the outcome."""


class VirtualClock:
    """The virtual time of a job, and the real work that is running in it.

    Args:
        schedule: when the job starts or is resumed.
    """

    # No __dict__: Prefect walks the parameters of tasks, and must not walk this.
    __slots__ = ("_attempts", "_driving", "_ended", "_turns", "_works", "schedule")

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._ended: dict[str, asyncio.Future[list[Outcome]]] = {}
        """site -> outcomes of its current work."""
        self._turns: dict[str, asyncio.Future[bool]] = {}
        """site -> whether it starts the current round; decided when its earlier work is done."""
        self._attempts: dict[str, int] = {}
        """site -> the attempt that first asks it in the current round."""
        self._works: set[asyncio.Task[None]] = set()
        self._driving: asyncio.Task[None] | None = None

    def owes(self, site: str, round: int) -> bool:
        """Whether a site is still working on its part of a round."""
        part = self.schedule.at_work.get(site)
        return part is not None and part.round == round

    def begin(self, number: int, turn: Turn, answers: Answers) -> None:
        """A round's turn has come, or it asks the missing sites again."""
        loop = asyncio.get_running_loop()
        self._turns, self._attempts = {site: loop.create_future() for site in turn.sites}, {}
        self._driving = asyncio.create_task(self._drive(number, turn, answers))

    async def ask(self, site: str, attempt: int, turn: Turn, work: Ask) -> None:
        """Have a site do its part as soon as it is free; returns when the round has closed.

        Raises:
            SiteError: the site failed before the round closed.
        """
        assert self._driving is not None, "begin() comes first"
        self._attempts[site] = attempt
        begun = self._begin_work(site, turn, work) if await asyncio.shield(self._turns[site]) else None
        await asyncio.shield(self._driving)
        if begun is not None and site not in self.schedule.at_work and (error := begun.exception()) is not None:
            raise error

    def go_on(self, site: str, turn: Turn, work: Ask) -> None:
        """Redo the work that a site was doing when an earlier coordinator was lost."""
        self._ended[site] = asyncio.get_running_loop().create_future()
        self._begin_work(site, turn, work)

    async def close(self) -> None:
        """The job is over: cancel the running work. Idempotent."""
        left = [*self._works, *([self._driving] if self._driving is not None else [])]
        for each in left:
            each.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _begin_work(self, site: str, turn: Turn, work: Ask) -> "asyncio.Task[None]":
        answers = Answers(time.monotonic(), _NEVER, turn.probes)
        task = asyncio.create_task(work(answers))
        self._works.add(task)
        task.add_done_callback(self._works.discard)
        task.add_done_callback(partial(_settle, self._ended[site], answers))
        return task

    def _start(self, number: int, sites: Collection[str]) -> None:
        """Start the round now at those of some sites that are idle."""
        idle = [site for site in sites if site not in self.schedule.at_work]
        self.schedule = self.schedule.begin(number, idle)
        for site in idle:
            self._ended[site] = asyncio.get_running_loop().create_future()
            self._turns[site].set_result(True)

    async def _drive(self, number: int, turn: Turn, answers: Answers) -> None:
        """Jump from one end of a part to the next until the round closes."""
        opened, waited, closes = self.schedule.now, set(turn.sites), None
        accepted: list[float] = []
        try:
            self._start(number, waited)
            while waited and (closes is None or self.schedule.next_end <= closes):
                moment = self.schedule.next_end
                schedule, done = self.schedule.at(moment)
                came = {site: await self._ended[site] for site in done}
                self.schedule = schedule
                fresh = {site: came[site] for site, part in done.items() if part.round == number}
                waited -= fresh.keys()
                accepted += _note(fresh, answers, turn.quorum.take, accepted, moment - opened)
                closes = _closing(turn.quorum, accepted, opened, moment)
                if closes is None or closes > moment:
                    self._start(number, waited & _late(done, number))
            if waited and closes is not None:
                self.schedule, _ = self.schedule.at(closes)
            answers.outcomes.extend(Late(site, self._attempts.get(site, 0)) for site in in_order(waited))
        finally:
            answers.closed.set()
            for begins in self._turns.values():
                if not begins.done():
                    begins.set_result(False)


def _late(done: Mapping[str, Part], number: int) -> set[str]:
    return {site for site, part in done.items() if part.round < number}


def _closing(quorum: Quorum, accepted: list[float], opened: float, moment: float) -> float | None:
    """When the round closes, given the updates so far; None: no time is set yet."""
    after = quorum.closes_after(accepted)
    if after is None:
        return None
    return moment if after <= moment - opened else opened + after


def _note(
    fresh: Mapping[str, list[Outcome]], answers: Answers, take: int | None, accepted: list[float], at: float
) -> list[float]:
    """Note the outcomes of one moment, in site order; updates beyond those that the round takes are
    late.

    Returns: the times of the accepted updates.
    """
    times: list[float] = []
    for outcomes in fresh.values():
        for outcome in outcomes:
            if not isinstance(outcome, Accepted):
                answers.outcomes.append(outcome)
            elif take is not None and len(accepted) + len(times) >= take:
                answers.outcomes.append(Late(outcome.site, outcome.attempt))
            else:
                answers.outcomes.append(outcome)
                times.append(at)
    return times


def _settle(ended: "asyncio.Future[list[Outcome]]", answers: Answers, work: "asyncio.Task[None]") -> None:
    """Pass on the outcomes of a site's work; a `SiteError` is already among them."""
    if ended.done():  # the job has ended in the meantime
        return
    if work.cancelled():
        ended.cancel()
    elif (error := work.exception()) is not None and not isinstance(error, SiteError):
        ended.set_exception(error)
    else:
        ended.set_result(answers.outcomes)
