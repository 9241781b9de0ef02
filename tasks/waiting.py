"""How long a site's part of a round is waited for, when the site cannot be reached."""

import asyncio
import time
from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from fedpool.sites.output import LogLine
from fedpool.tasks.reach import NO_WORKER

AWAY = "Away"
"""Name of the state of a run whose site could not be reached for too long; no run on the server
is ever in it.
"""


class Waiting:
    """Someone who waits for a site's part of a round.

    Attributes:
        ended: the state that the run ended in; None when its manifest was there first.
        patience_s: how long the site may be unreachable.
        log: told when it becomes unreachable, and when it can be reached again.
        begun: whether a worker has taken the run, as far as is known.
        away_since: since when it has been unreachable, as far as is known (`time.monotonic()`).
    """

    __slots__ = ("away_since", "begun", "ended", "log", "patience_s")

    def __init__(self, patience_s: float, log: LogLine) -> None:
        self.ended: asyncio.Future[State[Any] | None] = asyncio.get_running_loop().create_future()
        self.patience_s = patience_s
        self.log = log
        self.begun = False
        self.away_since: float | None = None

    def resolve(self, state: State[Any] | None) -> None:
        """The wait is over, unless it was before."""
        if not self.ended.done():
            self.ended.set_result(state)

    def note(self, hindrance: str | None, pool: str) -> None:
        """Note whether the site can be reached; once it could not for too long, the wait is
        over.
        """
        if hindrance is None:
            if self.away_since is not None:
                self.log("it can be reached again")
            self.away_since = None
            return
        what = f"no worker of work pool {pool} is online" if hindrance == NO_WORKER else f"work pool {pool} is paused"
        now = time.monotonic()
        if self.away_since is None:
            self.away_since = now
            self.log(f"{what}: waiting for it for up to {self.patience_s:g} s (site_patience_s)")
        if now - self.away_since >= self.patience_s:
            message = f"{what}, and that did not change within {self.patience_s:g} s (site_patience_s)"
            self.resolve(Cancelled(name=AWAY, message=message))
