"""What a site asks of whoever hands it work, in one place: a `Desk`.

A site's worker is written against this protocol alone, and so knows nothing of a Prefect server.
Values go in and out frozen. An implementation passes the tests in tests/deployments/test_desk.py.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID

SITE_ROUND = "site-round"
"""The one kind of work that a site does."""


class Phase(StrEnum):
    """How far a piece of work has come. Each of the last four is an end."""

    TAKEN = "taken"
    STARTED = "started"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    CRASHED = "crashed"

    @property
    def ended(self) -> bool:
        """Whether nothing comes after it."""
        return self not in (Phase.TAKEN, Phase.STARTED)


@dataclass(frozen=True, slots=True)
class Report:
    """What a site says of a piece of work.

    Attributes:
        message: for people; empty: there is nothing to add.
    """

    phase: Phase
    message: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of work, as it is offered to a site. It comes from outside: nothing in it has been
    checked.

    Attributes:
        name: for people.
        kind: what is to be done; a site does `SITE_ROUND` and nothing else.
        parameters: of that.
    """

    id: UUID
    name: str
    kind: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Presence:
    """The answer to a sign of life.

    Attributes:
        new: whether the desk did not know this process until now: it has just started, or the desk
            has lost its memory.
        clock_ahead_s: by how much this machine's clock is ahead of the desk's; measured when `new`,
            else 0.
    """

    new: bool
    clock_ahead_s: float = 0.0


class Reports(Protocol):
    """What whoever does a piece of work says of it, and asks about it.

    All methods raise `Unreachable` when there is no answer, which may be worth another try, and
    `ServerError` when there is a refusal, which is not.
    """

    async def report(self, piece: Piece, report: Report) -> bool:
        """Say how far a piece has come.

        Returns: whether the report stands. False when somebody else has the piece, or someone is
            cancelling it, so that the work is to end too; and False for a crash of a piece that has
            ended. Another end, or a start, may replace an end that was reported.
        """
        ...

    def log(self, piece: Piece, line: str, *, error: bool = False) -> None:
        """Add a line to the log of a piece. Returns at once, loses lines rather than fail; from
        any thread.
        """
        ...

    async def cancelled(self, pieces: Collection[UUID]) -> frozenset[UUID]:
        """Those of some pieces that someone has cancelled."""
        ...


class Desk(Reports, Protocol):
    """What a site's worker asks beyond that: it is there, it asks for work, it has left work
    behind, it leaves.
    """

    @property
    def name(self) -> str:
        """What to call it in a sentence, such as "the Prefect server"."""
        ...

    async def attend(self) -> Presence:
        """Give a sign of life, by which the site counts as online. The first one makes the site
        known; the caller repeats it.

        Raises:
            ConfigError: another process serves the site.
        """
        ...

    async def next(self) -> Sequence[Piece]:
        """The pieces that are offered to this site now, the most urgent first. Whoever wants one
        reports it as taken.
        """
        ...

    async def left_behind(self, in_hand: Collection[UUID]) -> Sequence[Piece]:
        """Pieces that this site has taken and not ended, and which it is not at work on: an earlier
        process of it was killed.

        Args:
            in_hand: those that it is at work on.
        """
        ...

    async def leave(self) -> None:
        """The site is offline from now on, and another process may serve it. Harmless when
        repeated.
        """
        ...
