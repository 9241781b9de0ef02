"""`Desk`: everything that a site asks of the side that hands it work.

A site's worker is written against this protocol only, so it does not depend on a Prefect server.
All values are frozen. Every implementation passes the tests in tests/deployments/test_desk.py.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID

SITE_ROUND = "site-round"
"""The only kind of work that a site does."""


class Phase(StrEnum):
    """How far a piece of work has come. The last four phases are final."""

    TAKEN = "taken"
    STARTED = "started"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    CRASHED = "crashed"

    @property
    def ended(self) -> bool:
        """Whether this phase is final."""
        return self not in (Phase.TAKEN, Phase.STARTED)


@dataclass(frozen=True, slots=True)
class Report:
    """A site's report on a piece of work.

    Attributes:
        message: text for people; may be empty.
    """

    phase: Phase
    message: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of work offered to a site. It comes from outside, so nothing in it is checked yet.

    Attributes:
        name: a name for people.
        kind: the kind of work; a site does only `SITE_ROUND`.
        parameters: parameters of that kind of work.
    """

    id: UUID
    name: str
    kind: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Presence:
    """The answer to a heartbeat.

    Attributes:
        new: whether the desk did not know this process yet, because the process has just started or
            the desk has lost its state.
        clock_ahead_s: seconds by which this machine's clock is ahead of the desk's; measured only
            if `new`, else 0.
    """

    new: bool
    clock_ahead_s: float = 0.0


class Reports(Protocol):
    """Reports on pieces of work, and questions about them.

    All methods raise `Unreachable` if there is no answer, which may be worth another try, and
    `ServerError` if the request is refused, which is not.
    """

    async def report(self, piece: Piece, report: Report) -> bool:
        """Report how far a piece has come.

        Returns: whether the report was accepted. False if another process has the piece or someone
        is cancelling it, so the work has to end, or if a crash is reported for a piece that has
        already ended. Another final phase, or a start, may replace a final phase that was reported.
        """
        ...

    def log(self, piece: Piece, line: str, *, error: bool = False) -> None:
        """Add a line to a piece's log, from any thread. Returns at once; may drop lines."""
        ...

    async def cancelled(self, pieces: Collection[UUID]) -> frozenset[UUID]:
        """The pieces among these that someone has cancelled."""
        ...


class Desk(Reports, Protocol):
    """What a worker also asks: to be online, to get work, to clean up after a crash, to leave."""

    @property
    def name(self) -> str:
        """The desk's name for messages, such as "the Prefect server"."""
        ...

    async def attend(self) -> Presence:
        """Send a heartbeat, which keeps the site online; the first one registers it. Call it often.

        Raises:
            ConfigError: another process serves the site.
        """
        ...

    async def next(self) -> Sequence[Piece]:
        """The pieces offered to this site now, most urgent first. To take one, report that."""
        ...

    async def left_behind(self, in_hand: Collection[UUID]) -> Sequence[Piece]:
        """Pieces that this site took and never ended, because an earlier process was killed.

        Args:
            in_hand: the pieces that this process is working on.
        """
        ...

    async def leave(self) -> None:
        """Take the site offline, so that another process may serve it. Idempotent."""
        ...
