"""Sites behind work pools: how a coordinator reaches sites that are elsewhere.

A round is announced to a site as a run of its deployment `site-round/SITE`, ahead of the round's
turn, because a worker that polls takes seconds to pick it up. The run waits at the site until its
assignment lies in the store. A site has answered when the manifest of its update lies there too:
one listing tells of all sites of a round. Prefect knows seconds later that a run has ended, and is
asked, in one query for all runs, only after those that ended without.
"""

import asyncio
import contextlib
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from uuid import UUID

import httpx
from prefect import task
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, PrefectException, PrefectHTTPStatusError
from prefect.states import Cancelled, Crashed, Pending, Scheduled

from fedpool.errors import ServerError, SiteError, StoreError, StoreRefused
from fedpool.manifest import ClientJob, SiteAssignment
from fedpool.paths import JobPaths
from fedpool.sites.output import LogLine
from fedpool.sites.site_round import Delivery, read_delivery
from fedpool.sites.sites import ELSEWHERE, Traits
from fedpool.store import Store
from fedpool.tasks.reach import GONE, Place, clock_ahead, find_place, read_pools, unreachable
from fedpool.tasks.waiting import AWAY, Waiting

_LOCAL_POLL_S = 0.05
_REMOTE_POLL_S = 0.25
"""How often to look for manifests."""
_API_POLL_S = 2.0
_WORKERS_POLL_S = 5.0
"""How often to look whether the sites' workers are online, at the least: a query for each, so no
more than one a second.
"""
_API_PATIENCE_S = 600.0
"""How long the Prefect API may be unreachable before the sites count as lost."""
_PAGE = 200

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

    traits: ClassVar[Traits] = ELSEWHERE

    # No __dict__: Prefect would walk an object with one when it stores a flow's parameters.
    __slots__ = (
        "_ahead",
        "_answered",
        "_cancelled",
        "_client",
        "_job",
        "_job_run",
        "_places",
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
        self._places: dict[str, Place] = {}
        self._ahead: timedelta | None = None
        self._runs: dict[_Key, UUID] = {}
        self._waiting: dict[_Key, Waiting] = {}
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
        client = await self._connect()
        tracking = await self._tracking(client, f"{site}-{attempt}" if attempt else site)
        try:
            run = await self._create(client, site, round, attempt, tracking)
        except (ObjectNotFound, PrefectHTTPStatusError) as error:
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code != 404:
                raise
            self._places.pop(site, None)  # it may be registered anew
            raise SiteError(
                site, round, f"it has no deployment site-round/{site}: start its worker, or register it"
            ) from None
        self._runs[site, round, attempt] = run.id
        return run.state is None or not run.state.is_final()  # an earlier coordinator's may have ended with it

    async def _create(
        self, client: PrefectClient, site: str, round: int, attempt: int, tracking: UUID | None
    ) -> FlowRun:
        assert self._job is not None and self._store is not None, "open() comes first"
        place = await self._place(site)
        run: FlowRun = await client.create_flow_run_from_deployment(
            place.deployment,
            # Else a run is due by this machine's clock, and workers take it when it is due by the
            # server's or their own.
            state=Scheduled(scheduled_time=datetime.now(UTC) - await self._clock_ahead(client)),
            parameters={
                "job_id": self._job.job_id,
                "site": site,
                "round": round,
                "attempt": attempt,
                "store": self._store.url,
            },
            name=f"{self._job.job_id} round {round} {site}" + (f" attempt {attempt}" if attempt else ""),
            idempotency_key=f"{self._job.job_id}/{round}/{site}/{attempt}",
            parent_task_run_id=tracking,
        )
        return run

    async def unreachable(self, sites: Collection[str]) -> dict[str, str]:
        """See `Sites.unreachable`."""
        places = {}
        try:
            for site in sites:
                self._places.pop(site, None)  # it may have been registered anew, with another pool
                with contextlib.suppress(ObjectNotFound):  # whoever asks it is told
                    places[site] = await self._place(site)
            pools = await read_pools(await self._connect(), {place.pool for place in places.values()})
        except (httpx.HTTPError, PrefectException):  # nobody knows: whoever waits for them will see
            return {}
        return unreachable(places, pools)

    async def perform(
        self, assignment: SiteAssignment, *, deadline: float | None, patience_s: float, log: LogLine
    ) -> Delivery:
        """See `Sites.perform`."""
        assert self._job is not None and self._store is not None, "open() comes first"
        site, round, attempt = assignment.site, assignment.round, assignment.attempt
        key = (site, round, attempt)
        if key not in self._runs:
            await self.announce(*key)
        try:
            await asyncio.to_thread(self._assign, assignment)
            state = await self._answer(key, deadline, Waiting(patience_s, log))
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
        """See `Sites.end`: runs that have not answered are cancelled; the sites learn the rest
        from the store.
        """
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

    @property
    def endings(self) -> Mapping[str, str]:
        """See `Sites.endings`: none is known yet, because sites learn of the end from the
        result.
        """
        return {}

    def cancel(self) -> None:
        """Give up what is under way: whoever waits for a site gets a `SiteError`."""
        self._cancelled = True
        for waiting in self._waiting.values():
            waiting.resolve(Cancelled(message="the job was cancelled"))

    async def _connect(self) -> PrefectClient:
        if self._client is None:
            self._client = asyncio.get_running_loop().create_future()
            self._client.set_result(await self._stack.enter_async_context(get_client()))
        return await asyncio.shield(self._client)

    async def _place(self, site: str) -> Place:
        if site not in self._places:
            self._places[site] = await find_place(await self._connect(), site)
        return self._places[site]

    async def _clock_ahead(self, client: PrefectClient) -> timedelta:
        if self._ahead is None:
            self._ahead = await clock_ahead(client)
        return self._ahead

    async def _tracking(self, client: PrefectClient, site: str) -> UUID | None:
        """The task run by which the UI links the site's run to the round's, as Prefect does for
        subflows.
        """
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

    async def _answer(self, key: _Key, deadline: float | None, waiting: Waiting) -> State[Any] | None:
        """Wait for a site's part of a round; see `Waiting.ended`."""
        self._waiting[key] = waiting
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_sites())
        try:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            return await asyncio.wait_for(asyncio.shield(waiting.ended), remaining)
        except TimeoutError:
            client = await self._connect()
            late: State[Any] = Cancelled(message="the round's deadline has passed (round_timeout)")
            await client.set_flow_run_state(self._runs[key], late, force=True)
            site, round, _ = key
            raise SiteError(site, round, "sent no update before the round's deadline (round_timeout)") from None
        finally:
            del self._waiting[key]

    async def _watch_sites(self) -> None:
        """Pass on what the store and Prefect tell of the sites that someone waits for, until the
        job ends.
        """
        try:
            async with asyncio.TaskGroup() as watches:  # apart from each other: a busy server takes seconds to answer
                watches.create_task(self._watch_store())
                watches.create_task(self._watch_runs())
        except* Exception as group:  # noqa: BLE001  # whoever waits would wait for ever
            error = next((e for e in group.exceptions if isinstance(e, StoreRefused)), group.exceptions[0])
            for waiting in self._waiting.values():
                if not waiting.ended.done():
                    waiting.ended.set_exception(error)

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
                    # The workers could not reach it either, and they try again at intervals that
                    # grow.
                    for waiting in self._waiting.values():
                        waiting.away_since = None
                    looked_at_workers = now + away_s
                answered = now
                if now - looked_at_workers > max(_WORKERS_POLL_S, len(self._waiting)):
                    looked_at_workers = now
                    await self._look_at_workers()
            except (httpx.HTTPError, PrefectException) as error:
                if time.monotonic() - answered > _API_PATIENCE_S:
                    message = f"the Prefect API could not be reached for {_API_PATIENCE_S:g} s: {error}"
                    for waiting in self._waiting.values():
                        waiting.resolve(Cancelled(message=message))

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
                    self._waiting[key].resolve(None)

    async def _look_at_runs(self) -> None:
        waited = {self._runs[key]: waiting for key, waiting in self._waiting.items()}
        found = await self._read([*waited, *([self._job_run] if self._job_run else [])])
        if self._job_run is not None and self._job_run not in {run.id for run in found}:
            for waiting in waited.values():
                if not waiting.ended.done():
                    waiting.ended.set_exception(ServerError(gone(await self._connect(), self._job_run)))
            return
        for run_id in waited.keys() - {run.id for run in found}:
            # Deleted by itself, or with its deployment before a worker had taken it: nobody would
            # ever answer.
            lost: State[Any] = Crashed(name="Deleted", message="someone has deleted its run from the Prefect server")
            waited[run_id].resolve(lost)
        for run in found:
            if run.state is None:
                continue
            if run.id == self._job_run:
                if run.state.is_cancelling() or run.state.is_cancelled():
                    self.cancel()
            elif run.state.is_final():
                waited[run.id].resolve(run.state)
            else:
                waited[run.id].begun = not run.state.is_scheduled()

    async def _read(self, ids: Sequence[UUID]) -> list[FlowRun]:
        client = await self._connect()
        found: list[FlowRun] = []
        for start in range(0, len(ids), _PAGE):
            page = FlowRunFilter(id=FlowRunFilterId(any_=list(ids[start : start + _PAGE])))
            found += await client.read_flow_runs(flow_run_filter=page, limit=_PAGE)
        return found

    async def _look_at_workers(self) -> None:
        """Give up on sites that stay unreachable: their workers were killed, or stopped, or get
        no work.
        """
        waited = {key: waiting for key, waiting in self._waiting.items() if key[0] in self._places}
        places = dict(self._places)
        pools = await read_pools(await self._connect(), {places[site].pool for site, _, _ in waited})
        for (site, _, _), waiting in waited.items():
            place = places[site]
            hindrance = pools.get(place.pool, GONE).hinders(resident=place.resident, begun=waiting.begun)
            waiting.note(hindrance, place.pool)


def gone(client: PrefectClient, job_run: UUID) -> str:
    """What is to be said of a job whose run the server does not know any more."""
    return (
        f"its run {job_run} is gone from the Prefect server at {client.api_url}: someone has deleted it, or the server has "
        "lost its database"
    )


def _cause(state: State[Any], site: str, round: int) -> str:
    """What a failed run says of itself, without what the coordinator's own message says already."""
    message = state.message or "no reason was given"
    return message.partition(f"{site}, round {round}: ")[2] or message
