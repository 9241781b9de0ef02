"""How long a round waits for a site that is unreachable."""

import asyncio
import time
from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from fedpool.sites.output import LogLine
from fedpool.tasks.reach import NO_WORKER

AWAY = "Away"
"""Name of the state for a run whose site was unreachable for too long; never set on the server."""


class Waiting:
    """The wait for a site's part of a round.

    Attributes:
        ended: the state that the run ended in; None if its manifest came first.
        patience_s: how long the site may be unreachable.
        log: gets a line when the site becomes unreachable, and when it is reachable again.
        begun: whether a worker has taken the run, as far as is known.
        away_since: when it became unreachable, as far as is known (`time.monotonic()`).
    """

    __slots__ = ("away_since", "begun", "ended", "log", "patience_s")

    def __init__(self, patience_s: float, log: LogLine) -> None:
        self.ended: asyncio.Future[State[Any] | None] = asyncio.get_running_loop().create_future()
        self.patience_s = patience_s
        self.log = log
        self.begun = False
        self.away_since: float | None = None

    def resolve(self, state: State[Any] | None) -> None:
        """End the wait, unless it has ended."""
        if not self.ended.done():
            self.ended.set_result(state)

    def note(self, hindrance: str | None, pool: str) -> None:
        """Note whether the site is reachable. If it wasn't for too long, the wait ends."""
        if hindrance is None:
            if self.away_since is not None:
                self.log("it is reachable again")
            self.away_since = None
            return
        what = f"no worker of work pool {pool} is online" if hindrance == NO_WORKER else f"work pool {pool} is paused"
        now = time.monotonic()
        if self.away_since is None:
            self.away_since = now
            self.log(f"{what}: waiting for up to {self.patience_s:g} s (site_patience_s)")
        if now - self.away_since >= self.patience_s:
            message = f"{what}, and that did not change within {self.patience_s:g} s (site_patience_s)"
            self.resolve(Cancelled(name=AWAY, message=message))
