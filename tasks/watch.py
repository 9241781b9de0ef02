"""Watches sites behind work pools: the store and Prefect show when a site has done its part.

A site has answered once the manifest of its update is in the store: one listing covers all sites of
a round. Prefect learns seconds later that a run has ended. One query for all runs asks it which
ones ended without a manifest.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectException
from prefect.states import Cancelled, Crashed

from fedpool.errors import ServerError, SiteError, StoreError, StoreRefused
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.reach import GONE, read_pools
from fedpool.tasks.site_runs import Key, SiteRuns
from fedpool.tasks.waiting import Waiting

_LOCAL_POLL_S = 0.05
_REMOTE_POLL_S = 0.25
"""Seconds between listings for manifests."""
_API_POLL_S = 2.0
_WORKERS_POLL_S = 5.0
"""Minimum seconds between checks whether the sites' workers are online. A check takes a query per
site, so there is at most one query per second.
"""
_API_PATIENCE_S = 600.0
"""How long the Prefect API may be unreachable before the sites count as lost."""


class Watch:
    """Watches the sites of a job that are being waited for.

    Args:
        runs: of the sites.
        paths: of the job.
        store: where the sites write their manifests.
        job_run: id of the job's own run, if it has one.
        cancel: called when someone has cancelled the job's run.
    """

    __slots__ = ("_cancel", "_job_run", "_paths", "_runs", "_store", "_task", "_waiting")

    def __init__(
        self, runs: SiteRuns, paths: JobPaths, store: Store, *, job_run: UUID | None, cancel: Callable[[], None]
    ) -> None:
        self._runs = runs
        self._paths = paths
        self._store = store
        self._job_run = job_run
        self._cancel = cancel
        self._waiting: dict[Key, Waiting] = {}
        self._task: asyncio.Task[None] | None = None

    async def answer(self, key: Key, deadline: float | None, waiting: Waiting) -> State[Any] | None:
        """Wait for a site's part of a round.

        Args:
            key: of the site's run.
            deadline: `time.monotonic()` at which to give up; None: never.
            waiting: the wait.

        Returns: see `Waiting.ended`.

        Raises:
            SiteError: the site missed the deadline.
        """
        self._waiting[key] = waiting
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch_sites())
        try:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            return await asyncio.wait_for(asyncio.shield(waiting.ended), remaining)
        except TimeoutError:
            await self._runs.cancel(key, "the round's deadline has passed (round_timeout)")
            site, round, _ = key
            raise SiteError(site, round, "sent no update before the round's deadline (round_timeout)") from None
        finally:
            del self._waiting[key]

    def resolve_all(self, why: str) -> None:
        """End every wait: the runs count as cancelled."""
        for waiting in self._waiting.values():
            waiting.resolve(Cancelled(message=why))

    def end(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()

    async def _watch_sites(self) -> None:
        """Pass on news from the store and Prefect to the waits, until `end`."""
        try:
            async with asyncio.TaskGroup() as watches:  # separate, because a busy server takes seconds to answer
                watches.create_task(self._watch_store())
                watches.create_task(self._watch_runs())
        except* Exception as group:  # noqa: BLE001  # otherwise the waits would never end
            error = next((e for e in group.exceptions if isinstance(e, StoreRefused)), group.exceptions[0])
            for waiting in self._waiting.values():
                if not waiting.ended.done():
                    waiting.ended.set_exception(error)

    async def _watch_store(self) -> None:
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
                    # The workers could not reach it either, and retry at growing intervals.
                    for waiting in self._waiting.values():
                        waiting.away_since = None
                    looked_at_workers = now + away_s
                answered = now
                if now - looked_at_workers > max(_WORKERS_POLL_S, len(self._waiting)):
                    looked_at_workers = now
                    await self._look_at_workers()
            except (httpx.HTTPError, PrefectException) as error:
                if time.monotonic() - answered > _API_PATIENCE_S:
                    message = f"the Prefect API was unreachable for {_API_PATIENCE_S:g} s: {error}"
                    self.resolve_all(message)

    async def _look_for_manifests(self) -> None:
        for round, attempt in {(round, attempt) for _, round, attempt in self._waiting}:
            try:
                found = await asyncio.to_thread(self._store.tree, self._paths.sites(round, attempt))
            except StoreRefused:
                raise
            except (OSError, StoreError):
                return  # no answer; a site that can't write either reports it by its run
            for key in list(self._waiting):
                if key[1:] == (round, attempt) and self._paths.site_manifest(key[0]) in found:
                    self._waiting[key].resolve(None)

    async def _look_at_runs(self) -> None:
        waited = {self._runs.ids[key]: waiting for key, waiting in self._waiting.items()}
        found = await self._runs.read([*waited, *([self._job_run] if self._job_run else [])])
        if self._job_run is not None and self._job_run not in {run.id for run in found}:
            for waiting in waited.values():
                if not waiting.ended.done():
                    waiting.ended.set_exception(ServerError(gone(await self._runs.connect(), self._job_run)))
            return
        for run_id in waited.keys() - {run.id for run in found}:
            # Deleted on its own, or with its deployment before a worker had taken it: it will never
            # be answered.
            lost: State[Any] = Crashed(name="Deleted", message="its run was deleted from the Prefect server")
            waited[run_id].resolve(lost)
        for run in found:
            if run.state is None:
                continue
            if run.id == self._job_run:
                if run.state.is_cancelling() or run.state.is_cancelled():
                    self._cancel()
            elif run.state.is_final():
                waited[run.id].resolve(run.state)
            else:
                waited[run.id].begun = not run.state.is_scheduled()

    async def _look_at_workers(self) -> None:
        """Give up on sites that stay unreachable: no worker is online, or the pool is paused."""
        waited = {key: waiting for key, waiting in self._waiting.items() if key[0] in self._runs.places}
        places = dict(self._runs.places)
        pools = await read_pools(await self._runs.connect(), {places[site].pool for site, _, _ in waited})
        for (site, _, _), waiting in waited.items():
            place = places[site]
            hindrance = pools.get(place.pool, GONE).hinders(resident=place.resident, begun=waiting.begun)
            waiting.note(hindrance, place.pool)


def gone(client: PrefectClient, job_run: UUID) -> str:
    """The error message for a job whose run the server no longer knows."""
    return (
        f"its run {job_run} is gone from the Prefect server at {client.api_url}: someone has deleted it, or the server has "
        "lost its database"
    )
