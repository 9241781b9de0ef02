"""The service that a site's worker runs, whoever hands it work: it is there, takes its rounds, does
them, and stops in order.

It is written against `Desk` alone. A desk that cannot be reached is waited for: scripts go on
meanwhile.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

import anyio
import anyio.to_thread

from fedpool.errors import ServerError, Unreachable
from fedpool.sites.config import SiteConfig
from fedpool.sites.desk import Desk, Phase, Piece, Report
from fedpool.sites.piece import check_piece, do_piece
from fedpool.sites.resident import Resident

_T = TypeVar("_T")
_Log = logging.Logger | logging.LoggerAdapter[logging.Logger]

_CANCEL_POLL_S = 8.0
_FAREWELL_S = 5.0
"""How long the desk may take to forget a site that stops."""
_SKEW_S = 5.0
"""From how many seconds on a clock that is off is worth a warning."""
_LOOK_PAUSE_S = 8.0
"""How long a site that has further rounds in hand leaves the desk alone before it looks for
more.
"""
_JITTER = 0.3
"""Of its intervals: sites that were started at once shall not ask at once for ever."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a site turns to its desk, in seconds.

    Attributes:
        look_s: for work.
        attend_s: with a sign of life.
    """

    look_s: float
    attend_s: float


class SiteService:
    """A site at work, with each job's session warm between its rounds. As a context manager it
    opens and closes the site.

    Args:
        config: of the site.
        desk: whoever hands it work.
        pace: how often it turns there.
        limit: how many pieces it has in hand at once, at the most; None: as many as there are.
        logger: told what happens.
    """

    def __init__(self, config: SiteConfig, desk: Desk, *, pace: Pace, limit: int | None, logger: _Log) -> None:
        self.config = config
        self._desk = desk
        self._pace = pace
        self._limit = limit
        self._logger = logger
        self._resident: Resident | None = None
        self._hands: dict[UUID, threading.Event] = {}
        """What it has in hand, from before it is taken until after its end is reported, and what
        stops it.
        """
        self._tasks: set[asyncio.Task[None]] = set()
        self._known = False
        self._new = False
        self._away = False
        self._looked_at_all = time.monotonic()
        self._looked = 0.0

    @property
    def silent_s(self) -> float:
        """For how long it has not looked for work."""
        return time.monotonic() - self._looked_at_all

    async def __aenter__(self) -> "SiteService":
        """Open the site, and make it known if the desk can be reached.

        Raises:
            ConfigError: another process serves the site.
        """
        self._resident = Resident(self.config)
        try:
            await self._patiently(self._attend())
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def run(self, *, once: bool = False) -> None:
        """Take work and do it, until this is cancelled.

        Args:
            once: only what is there now.

        Raises:
            ConfigError: another process has come to serve the site.
            ServerError: the desk refuses.
        """
        if once:
            await self._patiently(self._look())
            if self._tasks:
                await asyncio.wait(self._tasks)
            return
        loops = [
            asyncio.create_task(self._every(self._pace.attend_s, self._attend)),
            asyncio.create_task(self._every(self._pace.look_s, self._look, at_once=True)),
            asyncio.create_task(self._every(_CANCEL_POLL_S, self._stop_cancelled)),
        ]
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for loop in done:
                loop.result()
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)

    async def _every(self, seconds: float, act: Callable[[], Awaitable[None]], *, at_once: bool = False) -> None:
        if at_once:
            await self._patiently(act())
        while True:
            await asyncio.sleep(seconds * random.uniform(1 - _JITTER, 1 + _JITTER))
            await self._patiently(act())

    async def _patiently(self, request: Awaitable[_T]) -> _T | None:
        """Await a request; None when the desk cannot be reached just now."""
        try:
            answer = await request
        except Unreachable as error:
            if not self._away:
                self._logger.warning("%s, trying again until it answers", error)
            else:
                self._logger.debug("%s", error)
            self._away = True
            return None
        return answer

    def _note_answer(self) -> None:
        if self._away:
            self._logger.info("%s answers again", self._desk.name)
            self._away = False

    async def _attend(self) -> None:
        presence = await self._desk.attend()
        self._note_answer()
        self._new |= presence.new
        if presence.new:
            self._compare_clocks(presence.clock_ahead_s)
        if self._new:  # also when the attempt before got no further
            await self._hand_back_orphans()
            self._new = False
        self._known = True

    def _compare_clocks(self, ahead_s: float) -> None:
        """Say how far this machine's clock is off: nothing here goes by it, but others do, such
        as an object store.
        """
        if abs(ahead_s) >= _SKEW_S:
            self._logger.warning(
                "this machine's clock is %.0f s %s %s's. Rounds do not depend on it; object stores refuse requests that are "
                "15 minutes off: set the clock",
                abs(ahead_s),
                "ahead of" if ahead_s > 0 else "behind",
                self._desk.name,
            )

    async def _hand_back_orphans(self) -> None:
        """Report what this site was doing when its worker was killed as crashed: nobody else
        knows that it is lost.
        """
        lost = await self._desk.left_behind(list(self._hands))
        cancelled = await self._desk.cancelled([piece.id for piece in lost]) if lost else frozenset()
        for piece in lost:
            self._logger.warning("run %s was left behind when this worker ended: it has crashed", piece.name)
            phase = Phase.CANCELLED if piece.id in cancelled else Phase.CRASHED
            await self._desk.report(
                piece, Report(phase, f"the worker of {self.config.name} was lost while it did its part")
            )

    async def _look(self) -> None:
        """Take what is offered.

        With pieces in hand that wait for their rounds there is no hurry to find the ones after
        them, and a desk that has many sites would do little else than answer them all.
        """
        now = self._looked_at_all = time.monotonic()
        if not self._known or (len(self._hands) > 1 and now - self._looked < _LOOK_PAUSE_S):
            return
        self._looked = now
        for piece in await self._desk.next():
            if self._limit is not None and len(self._hands) >= self._limit:
                break
            if piece.id not in self._hands:
                self._hands[piece.id] = threading.Event()
                task = asyncio.create_task(self._take(piece))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        self._note_answer()

    async def _take(self, piece: Piece) -> None:
        assert self._resident is not None, "it is open"
        try:
            if await self._claim(piece):
                check_piece(piece)
                await do_piece(self._desk, piece, self._resident, stop=self._hands[piece.id])
        except Exception as error:
            self._logger.exception("run %s could not be done", piece.name)
            await self._give_up(piece, f"{type(error).__name__}: {error}")
        finally:
            del self._hands[piece.id]

    async def _claim(self, piece: Piece) -> bool:
        """Take a piece; False when it is not to be had, because it was cancelled, or somebody
        else was faster.
        """
        try:
            if await self._desk.report(piece, Report(Phase.TAKEN)):
                return True
            if piece.id in await self._desk.cancelled([piece.id]):  # while it was being taken: nobody else ends it
                await self._desk.report(piece, Report(Phase.CANCELLED, "it was cancelled before it had begun"))
            self._logger.info("run %s was not taken: it is not to be had any more", piece.name)
        except ServerError as error:  # a run that is still there is found again
            self._logger.info("run %s was not taken: %s", piece.name, error)
        return False

    async def _give_up(self, piece: Piece, why: str) -> None:
        try:
            await self._desk.report(piece, Report(Phase.CRASHED, why))
        except ServerError as error:
            self._logger.warning("%s could not be told so of run %s: %s", self._desk.name, piece.name, error)

    async def _stop_cancelled(self) -> None:
        """Stop what someone cancels in the UI; when a job ends, the site learns it from the
        store.
        """
        if not self._hands:
            return
        try:
            cancelled = await self._desk.cancelled(list(self._hands))
        except ServerError as error:  # the next look may find it
            self._logger.debug("could not look for cancelled runs: %s", error)
            return
        for piece in cancelled:
            if (stop := self._hands.get(piece)) is not None:
                stop.set()

    async def _close(self) -> None:
        """End every script first: the pieces that wait for them end as crashed, and are handed
        back. Then the site leaves.
        """
        with anyio.CancelScope(shield=True):
            if self._resident is not None:
                await anyio.to_thread.run_sync(self._resident.close)
            if self._tasks:
                await asyncio.wait(self._tasks)
        with anyio.move_on_after(_FAREWELL_S, shield=True):
            try:
                await self._desk.leave()
            except ServerError as error:
                self._logger.warning("the site's record stays on %s for a while: %s", self._desk.name, error)
