"""The `Desk` of a site with access to the Prefect server: rounds are flow runs in its work pool.

A run that the site takes is marked with the process that took it, so that the site's next process
knows what was left behind.
"""

import json
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError
from prefect.logging import get_logger

from fedpool.deployments.prefect_runs import PrefectRuns
from fedpool.deployments.site_claim import SiteClaim
from fedpool.errors import ServerError, Unreachable
from fedpool.flows.site_round import ENTRYPOINT, site_round
from fedpool.messages import SITE_PROTOCOL
from fedpool.sites.desk import Phase, Piece, Presence, Report
from fedpool.tasks.reach import SITE_POOL, clock_ahead

_PAGE = 200


@dataclass(frozen=True, slots=True)
class Mark:
    """The site that has taken a run, and its process at that time.

    It is stored as the run's `infrastructure_pid`, which is Prefect's field for what runs a run.
    The server keeps it through all state changes, and returns it with every run. A state's message
    would not do, because it is lost when someone cancels the run. Tags belong to the user, and can
    only be replaced as a whole. Labels are merged, but take as many requests, and mean nothing to
    Prefect. The server cannot filter by mark; filtering by work pool and state leaves few runs to
    check.
    """

    site: str
    host: str
    pid: int
    token: str

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, run: FlowRun) -> "Mark | None":
        """The mark of a run; None if there is none, or another program's."""
        try:
            return cls(**json.loads(run.infrastructure_pid or ""))
        except (ValueError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class Counter:
    """A site's work pool, and the worker that asks for its runs.

    Attributes:
        site: the site's name.
        worker: name of its worker, the same after a restart.
        pool: its work pool.
        queues: queues of the pool to look at; empty: all.
        heartbeat_s: interval between the worker's heartbeats.
        template: template for creating the pool; None: do not create it.
    """

    site: str
    worker: str
    pool: str
    heartbeat_s: float
    queues: Sequence[str] = ()
    template: Mapping[str, Any] | None = None


class PrefectDesk(PrefectRuns):
    """See `Desk`, and `open_desk`."""

    def __init__(self, client: PrefectClient, counter: Counter) -> None:
        super().__init__(client)
        self._counter = counter
        self._logger = get_logger("fedpool.site")
        self._claim = SiteClaim(counter.site, counter.worker, counter.pool, tell=self._logger.info)
        holder = self._claim.holder
        self._mark = Mark(counter.site, holder.host, holder.pid, holder.token)
        self._registered = False

    async def attend(self) -> Presence:
        """See `Desk.attend`: holds the claim, sends a heartbeat, registers the site if needed."""
        with self.answers():
            if await self._claim.hold(self._client):
                self._registered = False  # a server without the claim does not know the site either
            await self._send_heartbeat()
            if self._registered:
                return Presence(new=False)
            await register_site(self._client, self._counter.site, self._counter.pool)
            ahead = await clock_ahead(self._client)
        self._registered = True
        return Presence(new=True, clock_ahead_s=ahead.total_seconds())

    async def next(self) -> Sequence[Piece]:
        """See `Desk.next`. Runs are due as soon as they exist, whatever any clock says."""
        with self.answers():
            try:
                found = await self._client.get_scheduled_flow_runs_for_work_pool(
                    work_pool_name=self._counter.pool, work_queue_names=list(self._counter.queues)
                )
            except ObjectNotFound:  # the next heartbeat creates the pool
                return []
            return [await self.piece_of(entry.flow_run) for entry in found]

    async def report(self, piece: Piece, report: Report) -> bool:
        """See `Reports.report`. Marks a run before taking it, so no run in hand lacks a mark."""
        if report.phase.ended:
            return await super().report(piece, report)
        if report.phase is Phase.TAKEN:
            with self.answers():
                try:
                    await self._client.update_flow_run(piece.id, infrastructure_pid=str(self._mark))
                except PrefectHTTPStatusError as error:
                    if error.response.status_code != 404:
                        raise
                    return False
        stands = await super().report(piece, Report(report.phase, report.message or self._note))
        return stands or (report.phase is Phase.TAKEN and await self._is_mine(piece))

    async def left_behind(self, in_hand: Collection[UUID]) -> Sequence[Piece]:
        """See `Desk.left_behind`."""
        begun = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
        with self.answers():
            runs = await self._client.read_flow_runs(
                work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self._counter.pool])),
                flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=begun))),
                limit=_PAGE,
            )
            return [await self.piece_of(run) for run in runs if run.id not in in_hand and self._is_of_this_site(run)]

    async def leave(self) -> None:
        """See `Desk.leave`."""
        with self.answers():
            await self._claim.release(self._client)

    @property
    def _note(self) -> str:
        """Message that the UI shows for a run that this site has in hand."""
        return f"in the hands of worker {self._counter.worker}"

    def _is_of_this_site(self, run: FlowRun) -> bool:
        if run.infrastructure_pid is None:  # taken by an earlier version, which used the message as its mark
            return run.state is not None and run.state.message == self._note
        mark = Mark.of(run)
        return mark is not None and mark.site == self._counter.site

    async def _is_mine(self, piece: Piece) -> bool:
        """Whether this process has already taken the piece and only the answer was lost."""
        with self.answers():
            try:
                run = await self._client.read_flow_run(piece.id)
            except ObjectNotFound:
                return False
        return run.state is not None and run.state.is_pending() and Mark.of(run) == self._mark

    async def _send_heartbeat(self) -> None:
        counter = self._counter
        for known in (True, False):
            try:
                await self._client.send_worker_heartbeat(counter.pool, counter.worker, counter.heartbeat_s)
                return
            except PrefectHTTPStatusError as error:
                if error.response.status_code != 404 or not known:
                    raise
            await self._make_pool()

    async def _make_pool(self) -> None:
        counter = self._counter
        self._registered = False
        if counter.template is None:
            raise Unreachable(
                f"there is no work pool {counter.pool!r}: run prefect work-pool create --type {SITE_POOL} NAME"
            )
        try:
            await self._client.create_work_pool(
                WorkPoolCreate(name=counter.pool, type=SITE_POOL, base_job_template=dict(counter.template))
            )
            self._logger.info("created work pool %r", counter.pool)
        except ObjectAlreadyExists:  # another process was faster
            return


@asynccontextmanager
async def open_desk(counter: Counter) -> AsyncIterator[PrefectDesk]:
    """A desk on the configured Prefect server. It does not check that the server answers."""
    client = get_client()
    if not isinstance(client, PrefectClient):
        raise ServerError("no Prefect server is configured: set PREFECT_API_URL")
    async with client:
        yield PrefectDesk(client, counter)


async def register_site(client: PrefectClient, site: str, pool: str) -> UUID:
    """Create or update the deployment `site-round/SITE`, through which coordinators reach a site.

    Args:
        client: a Prefect client.
        pool: the site's work pool, of any type.
    """
    deployment: UUID = await client.create_deployment(  # replaces one with the same name
        flow_id=await client.create_flow(site_round),
        name=site,
        version=str(SITE_PROTOCOL),
        description=f"Coordinators reach {site} through this deployment. Its version is the protocol that the site speaks.",
        work_pool_name=pool,
        entrypoint=ENTRYPOINT,
        tags=["fedpool"],
    )
    return deployment
