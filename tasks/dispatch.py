"""Sites behind work pools: how a coordinator reaches sites that are elsewhere.

A round is announced to a site as a run of its deployment `site-round/SITE`, ahead of the round's turn, because a worker that
polls takes seconds to pick it up. The run waits at the site until its assignment lies in the store. One query tells of all
runs which have ended; what they left is in the store.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID

import httpx
from prefect import task
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, WorkerStatus
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelled, Pending
from pydantic import ValidationError

from fedpool.errors import SiteError
from fedpool.manifest import ClientJob, SiteAssignment, UpdateManifest
from fedpool.sites.session import LogLine
from fedpool.sites.site_round import Delivery
from fedpool.store import JobPaths, Store

_POLL_S = 0.2
_WORKERS_POLL_S = 5.0
_WORKERS_PATIENCE_S = 10.0
"""How long a site's workers must have been offline, which they are after three heartbeats that did not come, to count as lost."""
_API_PATIENCE_S = 600.0
"""How long the Prefect API may be away before the sites count as lost."""
_PAGE = 200

SITE_POOL = "fedpool-site"


@task(name="site-round")
def _site_round() -> None:
    """Stands for the run at the site in the round's graph; never called."""


class PoolSites:
    """Sites that are reached through their work pools.

    Args:
        names: of the sites; each has a deployment `site-round/NAME`.
    """

    # No __dict__: Prefect would walk an object with one when it stores a flow's parameters.
    __slots__ = (
        "_cancelled",
        "_client",
        "_deployments",
        "_job",
        "_job_run",
        "_offline_since",
        "_runs",
        "_stack",
        "_store",
        "_waiting",
        "_watch",
        "names",
        "num_slots",
    )

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.num_slots = len(self.names)
        self._cancelled = False
        self._stack = AsyncExitStack()
        self._client: asyncio.Future[PrefectClient] | None = None
        self._deployments: dict[str, tuple[UUID, str, bool]] = {}
        self._offline_since: dict[str, float] = {}
        self._runs: dict[tuple[str, int], UUID] = {}
        self._waiting: dict[UUID, asyncio.Future[State[Any]]] = {}
        self._watch: asyncio.Task[None] | None = None
        self._job: ClientJob | None = None
        self._job_run: UUID | None = None
        self._store: Store | None = None

    @property
    def cancelled(self) -> bool:
        """See `Sites.cancelled`."""
        return self._cancelled

    def open(self, job: ClientJob, store: Store) -> None:
        """See `Sites.open`."""
        self._job, self._store = job, store
        context = FlowRunContext.get()
        self._job_run = context.flow_run.id if context and context.flow_run else None

    async def announce(self, site: str, round: int) -> None:
        """See `Sites.announce`: creates the site's run of the round. Harmless when repeated."""
        assert self._job is not None and self._store is not None, "open() comes first"
        client = await self._connect()
        try:
            deployment, _, _ = await self._deployment(site)
        except ObjectNotFound:
            raise SiteError(
                site, round, f"it has no deployment site-round/{site}: start its worker, or register it"
            ) from None
        run = await client.create_flow_run_from_deployment(
            deployment,
            parameters={"job_id": self._job.job_id, "site": site, "round": round, "store": self._store.url},
            name=f"{self._job.job_id} round {round} {site}",
            idempotency_key=f"{self._job.job_id}/{round}/{site}",
            parent_task_run_id=await self._tracking(client, site),
        )
        self._runs[site, round] = run.id

    async def perform(self, assignment: SiteAssignment, *, deadline: float | None, log: LogLine) -> Delivery:
        """See `Sites.perform`."""
        assert self._job is not None and self._store is not None, "open() comes first"
        site, round, store = assignment.site, assignment.round, self._store
        if (site, round) not in self._runs:
            await self.announce(site, round)
        paths = JobPaths(self._job.job_id)
        run_id = self._runs[site, round]
        try:
            await asyncio.to_thread(store.write_json, paths.assignment(round, site), assignment.model_dump(mode="json"))
            state = await self._final_state(run_id, site, round, deadline)
            if self._cancelled:
                raise SiteError(site, round, "the job was cancelled")
            if not state.is_completed():
                raise SiteError(site, round, f"{state.name}: {_cause(state, site, round)}")
            data = await asyncio.to_thread(store.read_bytes, paths.manifest(round, site))
            return Delivery(UpdateManifest.model_validate_json(data), None)
        except FileNotFoundError:
            raise SiteError(site, round, "its run completed, but left no manifest in the store") from None
        except ValidationError as error:
            raise SiteError(site, round, f"its manifest is not one: {error}") from None

    async def end(self) -> None:
        """See `Sites.end`: what was announced and has not ended is cancelled; the sites learn the rest from the store."""
        if self._client is None:
            return
        with contextlib.suppress(httpx.HTTPError, PrefectException):  # without the server there is nothing to cancel
            client = await self._connect()
            for run in await self._read(list(self._runs.values())):
                if run.state is None or not run.state.is_final():
                    state: State[Any] = Cancelled(message="the job has ended")
                    # Harmless where a site is done already, or reports its own end first.
                    await client.set_flow_run_state(run.id, state)
        if self._watch is not None:
            self._watch.cancel()
        await self._stack.aclose()

    def cancel(self) -> None:
        """Give up what is under way: whoever waits for a site gets a `SiteError`."""
        self._cancelled = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(Cancelled(message="the job was cancelled"))

    async def _connect(self) -> PrefectClient:
        if self._client is None:
            self._client = asyncio.get_running_loop().create_future()
            self._client.set_result(await self._stack.enter_async_context(get_client()))
        return await asyncio.shield(self._client)

    async def _deployment(self, site: str) -> tuple[UUID, str, bool]:
        """Id of a site's deployment, its work pool, and whether the pool is one of site workers."""
        if site not in self._deployments:
            client = await self._connect()
            deployment = await client.read_deployment_by_name(f"site-round/{site}")
            pool = deployment.work_pool_name or ""
            resident = (await client.read_work_pool(pool)).type == SITE_POOL
            self._deployments[site] = deployment.id, pool, resident
        return self._deployments[site]

    async def _tracking(self, client: PrefectClient, site: str) -> UUID | None:
        """The task run by which the UI links the site's run to the round's, as Prefect does for subflows."""
        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            return None
        run = await client.create_task_run(
            task=_site_round,
            flow_run_id=context.flow_run.id,
            dynamic_key=site,
            name=f"site-round {site}",
            state=Pending(),
        )
        return run.id

    async def _final_state(self, run_id: UUID, site: str, round: int, deadline: float | None) -> State[Any]:
        waiting = self._waiting[run_id] = asyncio.get_running_loop().create_future()
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_runs())
        try:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            return await asyncio.wait_for(asyncio.shield(waiting), remaining)
        except TimeoutError:
            client = await self._connect()
            await client.set_flow_run_state(
                run_id, Cancelled(message="the round's deadline has passed (round_timeout)"), force=True
            )
            raise SiteError(site, round, "sent no update before the round's deadline (round_timeout)") from None
        finally:
            del self._waiting[run_id]

    async def _watch_runs(self) -> None:
        """Pass on the final states of the runs that someone waits for, until nobody does."""
        answered = look_at_workers = time.monotonic()
        while self._waiting:
            await asyncio.sleep(_POLL_S)
            try:
                for run in await self._read([*self._waiting, *([self._job_run] if self._job_run else [])]):
                    if run.state is None:
                        continue
                    if run.id != self._job_run and run.state.is_final():
                        self._resolve(run.id, run.state)
                    if run.id == self._job_run and (run.state.is_cancelling() or run.state.is_cancelled()):
                        self.cancel()
                now = time.monotonic()
                if (away_s := now - answered) > _WORKERS_POLL_S:
                    # For the workers it was away too, and they try again at intervals that grow.
                    self._offline_since.clear()
                    look_at_workers = now + _WORKERS_POLL_S + away_s
                answered = now
                if now > look_at_workers:
                    look_at_workers = now + _WORKERS_POLL_S
                    await self._give_up_on_lost_workers()
            except (httpx.HTTPError, PrefectException) as error:
                if time.monotonic() - answered > _API_PATIENCE_S:
                    for run_id in list(self._waiting):
                        self._resolve(
                            run_id, Cancelled(message=f"the Prefect API was away for {_API_PATIENCE_S:g} s: {error}")
                        )

    def _resolve(self, run_id: UUID, state: State[Any]) -> None:
        waiting = self._waiting.get(run_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(state)

    async def _read(self, ids: Sequence[UUID]) -> list[FlowRun]:
        client = await self._connect()
        found: list[FlowRun] = []
        for start in range(0, len(ids), _PAGE):
            page = FlowRunFilter(id=FlowRunFilterId(any_=list(ids[start : start + _PAGE])))
            found += await client.read_flow_runs(flow_run_filter=page, limit=_PAGE)
        return found

    async def _give_up_on_lost_workers(self) -> None:
        """A site whose only workers stay offline will not answer: its worker was killed, or never started."""
        client = await self._connect()
        for (site, _), run_id in list(self._runs.items()):
            if run_id not in self._waiting:
                continue
            _, pool, resident = await self._deployment(site)
            if not resident:
                continue  # elsewhere a run lives on without the worker that started it
            workers = await client.read_workers_for_work_pool(pool)
            if any(worker.status == WorkerStatus.ONLINE for worker in workers):
                self._offline_since.pop(site, None)
            elif time.monotonic() - self._offline_since.setdefault(site, time.monotonic()) >= _WORKERS_PATIENCE_S:
                message = f"no worker of work pool {pool} is online: it was lost, or stopped"
                self._resolve(run_id, Cancelled(name="Lost", message=message))


def _cause(state: State[Any], site: str, round: int) -> str:
    """What a failed run says of itself, without what the coordinator's own message says already."""
    message = state.message or "no reason was given"
    return message.partition(f"{site}, round {round}: ")[2] or message
