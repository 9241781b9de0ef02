"""Sites behind work pools: how a coordinator reaches remote sites.

A round is announced to a site as a run of its deployment `site-round/SITE`, ahead of the round's
turn, because a polling worker takes seconds to pick it up. The run waits at the site until its
assignment is in the store. A site has answered once the manifest of its update is there too.
"""

import asyncio
import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import httpx
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException

from fedpool.errors import SiteError, StoreError
from fedpool.messages import ClientJob, SiteAssignment
from fedpool.paths import JobPaths
from fedpool.sites.output import LogLine
from fedpool.sites.site_round import Delivery, read_delivery
from fedpool.sites.sites import ELSEWHERE, Traits
from fedpool.store import Store
from fedpool.tasks.site_runs import Key, SiteRuns
from fedpool.tasks.waiting import AWAY, Waiting
from fedpool.tasks.watch import Watch


class PoolSites:
    """Sites that are reached through their work pools.

    Args:
        names: of the sites; each has a deployment `site-round/NAME`.
    """

    traits: ClassVar[Traits] = ELSEWHERE

    # No __dict__: Prefect would walk an object with one when it stores a flow's parameters.
    __slots__ = ("_answered", "_cancelled", "_job", "_runs", "_store", "_watch", "names", "num_slots")

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.num_slots = len(self.names)
        self._cancelled = False
        self._runs = SiteRuns()
        self._answered: set[Key] = set()
        self._watch: Watch | None = None
        self._job: ClientJob | None = None
        self._store: Store | None = None

    @property
    def cancelled(self) -> bool:
        """See `Sites.cancelled`."""
        return self._cancelled

    def open(self, job: ClientJob, store: Store) -> None:
        """See `Sites.open`."""
        self._job, self._store = job, store
        context = FlowRunContext.get()
        job_run = context.flow_run.id if context and context.flow_run else None
        self._watch = Watch(self._runs, JobPaths(job.job_id), store, job_run=job_run, cancel=self.cancel)

    async def announce(self, site: str, round: int, attempt: int) -> bool:
        """See `Sites.announce`: creates the site's run of the round. Harmless when repeated."""
        assert self._job is not None and self._store is not None, "open() comes first"
        return await self._runs.create((site, round, attempt), job_id=self._job.job_id, store=self._store.url)

    async def unreachable(self, sites: Collection[str]) -> dict[str, str]:
        """See `Sites.unreachable`."""
        return await self._runs.unreachable(sites)

    async def perform(
        self, assignment: SiteAssignment, *, deadline: float | None, patience_s: float, log: LogLine
    ) -> Delivery:
        """See `Sites.perform`."""
        assert self._job is not None and self._store is not None and self._watch is not None, "open() comes first"
        site, round, attempt = assignment.site, assignment.round, assignment.attempt
        key = (site, round, attempt)
        if key not in self._runs.ids:
            await self.announce(*key)
        try:
            await asyncio.to_thread(self._assign, assignment)
            state = await self._watch.answer(key, deadline, Waiting(patience_s, log))
            if self._cancelled:
                raise SiteError(site, round, "the job was cancelled")
            if state is not None and not state.is_completed():
                if state.name == AWAY:
                    raise SiteError(site, round, state.message or AWAY, away=True)
                raise SiteError(site, round, f"{state.name}: {_cause(state, site, round)}", lost=state.is_crashed())
            delivery = await asyncio.to_thread(read_delivery, self._store, self._job.job_id, round, site, attempt)
            self._answered.add(key)
            return delivery
        except FileNotFoundError:
            raise SiteError(site, round, "its run completed, but left no manifest in the store", lost=True) from None

    def _assign(self, assignment: SiteAssignment) -> None:
        """Write an assignment, unless an earlier coordinator has."""
        assert self._job is not None and self._store is not None
        path = JobPaths(self._job.job_id).assignment(assignment.round, assignment.site, assignment.attempt)
        try:
            self._store.write_json(path, assignment.model_dump(mode="json"))
        except StoreError:
            if not self._store.exists(path):
                raise

    async def end(self) -> None:
        """See `Sites.end`: cancels runs without an answer; sites learn the rest from the store."""
        with contextlib.suppress(httpx.HTTPError, PrefectException):  # without the server, nothing can be cancelled
            await self._runs.cancel_all_but(self._answered)
        if self._watch is not None:
            self._watch.end()
        await self._runs.close()

    @property
    def endings(self) -> Mapping[str, str]:
        """See `Sites.endings`: none is known, because sites learn of the end from the result."""
        return {}

    def cancel(self) -> None:
        """Give up the current work: everyone who waits for a site gets a `SiteError`."""
        self._cancelled = True
        if self._watch is not None:
            self._watch.resolve_all("the job was cancelled")


def _cause(state: State[Any], site: str, round: int) -> str:
    """The message of a failed run, without the part that the coordinator's own message repeats."""
    message = state.message or "no reason was given"
    return message.partition(f"{site}, round {round}: ")[2] or message
