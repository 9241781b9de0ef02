"""Sites behind work pools: how a coordinator reaches sites that are elsewhere.

A round is announced to a site as a run of its deployment `site-round/SITE`, ahead of the round's turn, because a worker that
polls takes seconds to pick it up. The run waits at the site until its assignment lies in the store. A site has answered when the
manifest of its update lies there too: one listing tells of all sites of a round. Prefect knows seconds later that a run has
ended, and is asked, in one query for all runs, only after those that ended without.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, ClassVar
from uuid import UUID

import httpx
from prefect import task
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, WorkerStatus
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelled, Pending

from fedpool.errors import SiteError, StoreError, StoreRefused
from fedpool.manifest import ClientJob, SiteAssignment
from fedpool.paths import JobPaths
from fedpool.sites.session import LogLine
from fedpool.sites.site_round import Delivery, read_delivery
from fedpool.store import Store

_LOCAL_POLL_S = 0.05
_REMOTE_POLL_S = 0.25
"""How often to look for manifests."""
_API_POLL_S = 2.0
_WORKERS_POLL_S = 5.0
"""How often to look whether the sites' workers are online, at the least: a query for each, so no more than one a second."""
_WORKERS_PATIENCE_S = 10.0
"""How long a site's workers must have been offline, which they are after three heartbeats that did not come, to count as lost."""
_API_PATIENCE_S = 600.0
"""How long the Prefect API may be away before the sites count as lost."""
_PAGE = 200

SITE_POOL = "fedpool-site"

_LOST = "Lost"

_Key = tuple[str, int, int]
"""Site, round and attempt."""


@task(name="site-round")
def _site_round() -> None:
    """Stands for the run at the site in the round's graph; never called."""


class PoolSites:
    """Sites that are reached through their work pools.

    Args:
        names: of the sites; each has a deployment `site-round/NAME`.
    """

    have_runs: ClassVar[bool] = True

    # No __dict__: Prefect would walk an object with one when it stores a flow's parameters.
    __slots__ = (
        "_answered",
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
        self._runs: dict[_Key, UUID] = {}
        self._waiting: dict[_Key, asyncio.Future[State[Any] | None]] = {}
        """What someone waits for: the state that the run ended in; None when its manifest was there first."""
        self._answered: set[_Key] = set()
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

    async def announce(self, site: str, round: int, attempt: int) -> bool:
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
            parameters={
                "job_id": self._job.job_id,
                "site": site,
                "round": round,
                "attempt": attempt,
                "store": self._store.url,
            },
            name=f"{self._job.job_id} round {round} {site}" + (f" attempt {attempt}" if attempt else ""),
            idempotency_key=f"{self._job.job_id}/{round}/{site}/{attempt}",
            parent_task_run_id=await self._tracking(client, f"{site}-{attempt}" if attempt else site),
        )
        self._offline_since.pop(site, None)
        self._runs[site, round, attempt] = run.id
        return run.state is None or not run.state.is_final()  # an earlier coordinator's may have ended with it

    async def perform(self, assignment: SiteAssignment, *, deadline: float | None, log: LogLine) -> Delivery:
        """See `Sites.perform`."""
        assert self._job is not None and self._store is not None, "open() comes first"
        site, round, attempt = assignment.site, assignment.round, assignment.attempt
        key = (site, round, attempt)
        if key not in self._runs:
            await self.announce(*key)
        try:
            await asyncio.to_thread(self._assign, assignment)
            state = await self._answer(key, deadline)
            if self._cancelled:
                raise SiteError(site, round, "the job was cancelled")
            if state is not None and not state.is_completed():
                lost = state.is_crashed() or state.name == _LOST
                raise SiteError(site, round, f"{state.name}: {_cause(state, site, round)}", lost=lost)
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
        """See `Sites.end`: runs that have not answered are cancelled; the sites learn the rest from the store."""
        if self._client is None:
            return
        with contextlib.suppress(httpx.HTTPError, PrefectException):  # without the server there is nothing to cancel
            client = await self._connect()
            for run in await self._read([run for key, run in self._runs.items() if key not in self._answered]):
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

    async def _answer(self, key: _Key, deadline: float | None) -> State[Any] | None:
        """Wait for a site's part of a round; see `_waiting`."""
        waiting = self._waiting[key] = asyncio.get_running_loop().create_future()
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_sites())
        try:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            return await asyncio.wait_for(asyncio.shield(waiting), remaining)
        except TimeoutError:
            client = await self._connect()
            late: State[Any] = Cancelled(message="the round's deadline has passed (round_timeout)")
            await client.set_flow_run_state(self._runs[key], late, force=True)
            site, round, _ = key
            raise SiteError(site, round, "sent no update before the round's deadline (round_timeout)") from None
        finally:
            del self._waiting[key]

    async def _watch_sites(self) -> None:
        """Pass on what the store and Prefect tell of the sites that someone waits for, until the job ends."""
        try:
            async with asyncio.TaskGroup() as watches:  # apart from each other: a busy server takes seconds to answer
                watches.create_task(self._watch_store())
                watches.create_task(self._watch_runs())
        except* Exception as group:  # noqa: BLE001  # whoever waits would wait for ever
            error = next((e for e in group.exceptions if isinstance(e, StoreRefused)), group.exceptions[0])
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(error)

    async def _watch_store(self) -> None:
        assert self._store is not None
        pause = _LOCAL_POLL_S if self._store.is_local else _REMOTE_POLL_S
        while True:
            await asyncio.sleep(pause)
            await self._look_for_manifests()

    async def _watch_runs(self) -> None:
        answered = looked_at_workers = time.monotonic()
        while True:
            await asyncio.sleep(_API_POLL_S)
            try:
                await self._look_at_runs()
                now = time.monotonic()
                if (away_s := now - answered) > _WORKERS_POLL_S:
                    # For the workers it was away too, and they try again at intervals that grow.
                    self._offline_since.clear()
                    looked_at_workers = now + away_s
                answered = now
                if now - looked_at_workers > max(_WORKERS_POLL_S, len(self._waiting)):
                    looked_at_workers = now
                    await self._give_up_on_lost_workers()
            except (httpx.HTTPError, PrefectException) as error:
                if time.monotonic() - answered > _API_PATIENCE_S:
                    message = f"the Prefect API was away for {_API_PATIENCE_S:g} s: {error}"
                    for key in list(self._waiting):
                        self._resolve(key, Cancelled(message=message))

    async def _look_for_manifests(self) -> None:
        assert self._job is not None and self._store is not None
        paths = JobPaths(self._job.job_id)
        for round, attempt in {(round, attempt) for _, round, attempt in self._waiting}:
            try:
                found = await asyncio.to_thread(self._store.tree, paths.sites(round, attempt))
            except StoreRefused:
                raise
            except (
                OSError,
                StoreError,
            ):  # it does not answer; a site that cannot write to it either says so by its run
                return
            for key in list(self._waiting):
                if key[1:] == (round, attempt) and paths.site_manifest(key[0]) in found:
                    self._resolve(key, None)

    async def _look_at_runs(self) -> None:
        waited = {self._runs[key]: key for key in self._waiting}
        for run in await self._read([*waited, *([self._job_run] if self._job_run else [])]):
            if run.state is None:
                continue
            if run.id == self._job_run:
                if run.state.is_cancelling() or run.state.is_cancelled():
                    self.cancel()
            elif run.state.is_final():
                self._resolve(waited[run.id], run.state)

    def _resolve(self, key: _Key, state: State[Any] | None) -> None:
        waiting = self._waiting.get(key)
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
        for key in list(self._waiting):
            site = key[0]
            _, pool, resident = await self._deployment(site)
            if not resident:
                continue  # elsewhere a run lives on without the worker that started it
            workers = await client.read_workers_for_work_pool(pool)
            if any(worker.status == WorkerStatus.ONLINE for worker in workers):
                self._offline_since.pop(site, None)
            elif time.monotonic() - self._offline_since.setdefault(site, time.monotonic()) >= _WORKERS_PATIENCE_S:
                message = f"no worker of work pool {pool} is online: it was lost, or stopped"
                self._resolve(key, Cancelled(name=_LOST, message=message))


def _cause(state: State[Any], site: str, round: int) -> str:
    """What a failed run says of itself, without what the coordinator's own message says already."""
    message = state.message or "no reason was given"
    return message.partition(f"{site}, round {round}: ")[2] or message
