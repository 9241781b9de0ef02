"""The service that a site's worker runs: it stays online, does its rounds, and stops in order.

It is written against `Desk` only. While the desk cannot be reached, the service waits, and scripts
go on.
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
"""How long a stopping site waits for the desk to take it offline."""
_SKEW_S = 5.0
"""A clock that is off by at least this many seconds is worth a warning."""
_LOOK_PAUSE_S = 8.0
"""How long a site with several rounds in hand waits before it looks for more."""
_JITTER = 0.3
"""Relative variation of the intervals, so that sites that start together do not ask together."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a site asks its desk, in seconds.

    Attributes:
        look_s: interval between looks for work.
        attend_s: interval between heartbeats.
    """

    look_s: float
    attend_s: float


class SiteService:
    """A working site, with each job's session warm between rounds. Its context opens and closes it.

    Args:
        config: the site's settings.
        desk: the side that hands it work.
        pace: how often to ask the desk.
        limit: the most pieces to have in hand at once; None: no limit.
        logger: gets messages about the service.
    """

    def __init__(self, config: SiteConfig, desk: Desk, *, pace: Pace, limit: int | None, logger: _Log) -> None:
        self.config = config
        self._desk = desk
        self._pace = pace
        self._limit = limit
        self._logger = logger
        self._resident: Resident | None = None
        self._hands: dict[UUID, threading.Event] = {}
        """Pieces in hand, until their end is reported, each with the event that stops it."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._known = False
        self._new = False
        self._away = False
        self._looked_at_all = time.monotonic()
        self._looked = 0.0

    @property
    def silent_s(self) -> float:
        """Seconds since it last looked for work."""
        return time.monotonic() - self._looked_at_all

    async def __aenter__(self) -> "SiteService":
        """Open the site, and register it if the desk can be reached.

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
        """Take work and do it, until cancelled.

        Args:
            once: do only the work that is there now.

        Raises:
            ConfigError: another process now serves the site.
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
        """Await a request; None if the desk cannot be reached."""
        try:
            answer = await request
        except Unreachable as error:
            if not self._away:
                self._logger.warning("%s: trying again until it answers", error)
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
        if self._new:  # also if the previous attempt failed here
            await self._hand_back_orphans()
            self._new = False
        self._known = True

    def _compare_clocks(self, ahead_s: float) -> None:
        """Warn if this machine's clock is off. Object stores depend on it, fedpool does not."""
        if abs(ahead_s) >= _SKEW_S:
            self._logger.warning(
                "this machine's clock is %.0f s %s that of %s. Rounds do not depend on it, but object stores refuse requests "
                "that are 15 minutes off: set the clock",
                abs(ahead_s),
                "ahead of" if ahead_s > 0 else "behind",
                self._desk.name,
            )

    async def _hand_back_orphans(self) -> None:
        """Report the work of a killed worker as crashed: only this site knows that it is lost."""
        lost = await self._desk.left_behind(list(self._hands))
        cancelled = await self._desk.cancelled([piece.id for piece in lost]) if lost else frozenset()
        for piece in lost:
            self._logger.warning("run %s was left behind by an earlier worker: reporting it as crashed", piece.name)
            phase = Phase.CANCELLED if piece.id in cancelled else Phase.CRASHED
            await self._desk.report(
                piece, Report(phase, f"the worker of {self.config.name} was lost during its part of the round")
            )

    async def _look(self) -> None:
        """Take the work that is offered.

        A site that already has pieces waiting for their rounds is in no hurry to find the next
        ones, and a desk with many sites would do little else than answer them.
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
            self._logger.exception("run %s failed", piece.name)
            await self._give_up(piece, f"{type(error).__name__}: {error}")
        finally:
            del self._hands[piece.id]

    async def _claim(self, piece: Piece) -> bool:
        """Take a piece; False if it was cancelled, or if another process was faster."""
        try:
            if await self._desk.report(piece, Report(Phase.TAKEN)):
                return True
            if piece.id in await self._desk.cancelled([piece.id]):  # meanwhile, so nothing else ends it
                await self._desk.report(piece, Report(Phase.CANCELLED, "the run was cancelled before it began"))
            self._logger.info("run %s was not taken: it is no longer available", piece.name)
        except ServerError as error:  # if the run is still there, the next look finds it
            self._logger.info("run %s was not taken: %s", piece.name, error)
        return False

    async def _give_up(self, piece: Piece, why: str) -> None:
        try:
            await self._desk.report(piece, Report(Phase.CRASHED, why))
        except ServerError as error:
            self._logger.warning("%s did not get the crash report of run %s: %s", self._desk.name, piece.name, error)

    async def _stop_cancelled(self) -> None:
        """Stop pieces that were cancelled in the UI. The end of a job is seen in the store."""
        if not self._hands:
            return
        try:
            cancelled = await self._desk.cancelled(list(self._hands))
        except ServerError as error:  # the next look may succeed
            self._logger.debug("the look for cancelled runs failed: %s", error)
            return
        for piece in cancelled:
            if (stop := self._hands.get(piece)) is not None:
                stop.set()

    async def _close(self) -> None:
        """End all scripts, so that their pieces are reported as crashed, then leave the desk."""
        with anyio.CancelScope(shield=True):
            if self._resident is not None:
                await anyio.to_thread.run_sync(self._resident.close)
            if self._tasks:
                await asyncio.wait(self._tasks)
        with anyio.move_on_after(_FAREWELL_S, shield=True):
            try:
                await self._desk.leave()
            except ServerError as error:
                self._logger.warning(
                    "the site's record could not be removed from %s, and stays for a while: %s", self._desk.name, error
                )
