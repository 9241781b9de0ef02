"""The flow runs on the Prefect server that announce rounds to sites behind work pools."""

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect import task
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, PrefectException, PrefectHTTPStatusError
from prefect.states import Cancelled, Pending, Scheduled

from fedpool.errors import SiteError
from fedpool.tasks.reach import Place, clock_ahead, find_place, read_pools, unreachable

_PAGE = 200

Key = tuple[str, int, int]
"""Site, round and attempt."""


@task(name="site-round")
def _site_round() -> None:
    """Represents the site's run in the round's graph; never called."""


class SiteRuns:
    """The runs of a job's sites, and the connection to their server.

    Attributes:
        ids: of the runs that were created.
        places: site -> how to reach it, for the sites that were looked up.
    """

    __slots__ = ("_ahead", "_client", "_connecting", "_stack", "ids", "places")

    def __init__(self) -> None:
        self.ids: dict[Key, UUID] = {}
        self.places: dict[str, Place] = {}
        self._stack = AsyncExitStack()
        self._client: PrefectClient | None = None
        self._connecting = asyncio.Lock()
        self._ahead: timedelta | None = None

    async def connect(self) -> PrefectClient:
        """The connection to the server, opened on first use; the next caller retries a failure."""
        async with self._connecting:
            if self._client is None:
                self._client = await self._stack.enter_async_context(get_client())
            return self._client

    async def close(self) -> None:
        """Close the connection, if there is one."""
        self._client = None
        await self._stack.aclose()

    async def create(self, key: Key, *, job_id: str, store: str) -> bool:
        """Create a site's run of a round. Repeating the call is harmless.

        Returns: False if the run exists and is over: it may have ended with an earlier coordinator.

        Raises:
            SiteError: the site is not registered.
        """
        site, round, attempt = key
        client = await self.connect()
        tracking = await self._tracking(client, f"{site}-{attempt}" if attempt else site)
        try:
            run = await self._create(client, key, job_id, store, tracking)
        except (ObjectNotFound, PrefectHTTPStatusError) as error:
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code != 404:
                raise
            self.places.pop(site, None)  # it may be registered again
            raise SiteError(
                site, round, f"it has no deployment site-round/{site}: start its worker, or register it"
            ) from None
        self.ids[key] = run.id
        return run.state is None or not run.state.is_final()

    async def _create(self, client: PrefectClient, key: Key, job_id: str, store: str, tracking: UUID | None) -> FlowRun:
        site, round, attempt = key
        place = await self._place(site)
        run: FlowRun = await client.create_flow_run_from_deployment(
            place.deployment,
            # Otherwise this machine's clock decides when the run is due, but workers go by the
            # server's clock or their own.
            state=Scheduled(scheduled_time=datetime.now(UTC) - await self._clock_ahead(client)),
            parameters={
                "job_id": job_id,
                "site": site,
                "round": round,
                "attempt": attempt,
                "store": store,
            },
            name=f"{job_id} round {round} {site}" + (f" attempt {attempt}" if attempt else ""),
            idempotency_key=f"{job_id}/{round}/{site}/{attempt}",
            parent_task_run_id=tracking,
        )
        return run

    async def _tracking(self, client: PrefectClient, site: str) -> UUID | None:
        """The task run that links a site's run to the round's in the UI, as with subflows."""
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

    async def _place(self, site: str) -> Place:
        if site not in self.places:
            self.places[site] = await find_place(await self.connect(), site)
        return self.places[site]

    async def _clock_ahead(self, client: PrefectClient) -> timedelta:
        if self._ahead is None:
            self._ahead = await clock_ahead(client)
        return self._ahead

    async def unreachable(self, sites: Collection[str]) -> dict[str, str]:
        """site -> why a run for it would make no progress now; only for such sites."""
        places = {}
        try:
            for site in sites:
                self.places.pop(site, None)  # it may have been registered again, with another pool
                with contextlib.suppress(ObjectNotFound):  # asking the site reports that
                    places[site] = await self._place(site)
            pools = await read_pools(await self.connect(), {place.pool for place in places.values()})
        except (httpx.HTTPError, PrefectException):  # unknown: waiting for the sites will show it
            return {}
        return unreachable(places, pools)

    async def read(self, ids: Sequence[UUID]) -> list[FlowRun]:
        """The runs that the server still knows."""
        client = await self.connect()
        found: list[FlowRun] = []
        for start in range(0, len(ids), _PAGE):
            page = FlowRunFilter(id=FlowRunFilterId(any_=list(ids[start : start + _PAGE])))
            found += await client.read_flow_runs(flow_run_filter=page, limit=_PAGE)
        return found

    async def cancel(self, key: Key, why: str) -> None:
        """Cancel a run, whatever its state."""
        client = await self.connect()
        state: State[Any] = Cancelled(message=why)
        await client.set_flow_run_state(self.ids[key], state, force=True)

    async def cancel_all_but(self, answered: Collection[Key]) -> None:
        """The job has ended: cancel its unfinished runs, except the answered ones."""
        unanswered = [run for key, run in self.ids.items() if key not in answered]
        if not unanswered:
            return
        client = await self.connect()
        for run in await self.read(unanswered):
            if run.state is None or not run.state.is_final():
                state: State[Any] = Cancelled(message="the job has ended")
                # Harmless if the site has already finished, or reports its own end first.
                await client.set_flow_run_state(run.id, state)
