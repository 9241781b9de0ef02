"""What a coordinator learns about sites behind work pools, from a real store and a real server."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from fedpool.deployments.prefect_desk import register_site
from fedpool.errors import SiteError
from fedpool.messages import SiteAssignment
from fedpool.paths import JobPaths
from fedpool.sites.output import LogLine
from fedpool.sites.site_round import Delivery
from fedpool.store import Store
from fedpool.tasks.dispatch import PoolSites
from tests.updates import client_job, sent_by


class Asking:
    """A coordinator that asks one site, whose run no worker picks up."""

    def __init__(self, sites: PoolSites, store: Store, client: PrefectClient, run: UUID) -> None:
        self.sites = sites
        self.store = store
        self.client = client
        self.run = run

    async def answer(
        self, *, deadline: float | None = None, patience_s: float = 600.0, log: LogLine = lambda line: None
    ) -> Delivery:
        """What the site answers."""
        assignment = SiteAssignment(
            site="far", round=0, task="train", base_sha256="b" * 64, base_size=1, timeout_s=None
        )
        return await self.sites.perform(assignment, deadline=deadline, patience_s=patience_s, log=log)

    async def state(self) -> str | None:
        """The state name of the site's run."""
        return (await self.client.read_flow_run(self.run)).state_name


@asynccontextmanager
async def asking(folder: Path, *, paused: bool = False) -> AsyncIterator[Asking]:
    """A coordinator that has announced a round to a site with its own work pool."""
    pool, job = folder.name, client_job(job_id=folder.name)
    async with get_client() as client:
        await client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        await client.send_worker_heartbeat(pool, "worker", heartbeat_interval_seconds=600)
        await register_site(client, "far", pool)
        await client.update_work_pool(pool, WorkPoolUpdate(is_paused=paused))
        sites, store = PoolSites(["far"]), Store(folder)
        sites.open(job, store)
        assert await sites.announce("far", 0, 0)
        (run,) = [run for run in await client.read_flow_runs() if run.parameters.get("job_id") == job.job_id]
        yield Asking(sites, store, client, run.id)
        await sites.end()


def test_a_site_has_answered_once_its_manifest_lies_in_the_store(prefect_api: str, tmp_path: Path) -> None:
    async def answer() -> Delivery:
        async with asking(tmp_path) as far:
            manifest = JobPaths(tmp_path.name).manifest(0, "far", 0)
            far.store.write_bytes(manifest, sent_by("far").model_dump_json().encode())
            return await far.answer()

    assert asyncio.run(answer()).manifest.site == "far"


def test_a_site_whose_run_was_deleted_is_lost(prefect_api: str, tmp_path: Path) -> None:
    async def answer() -> SiteError:
        async with asking(tmp_path) as far:
            await far.client.delete_flow_run(far.run)
            with pytest.raises(SiteError) as caught:
                await far.answer()
            return caught.value

    error = asyncio.run(answer())
    assert error.lost and error.cause.startswith("Deleted: ")


def test_a_site_whose_pool_stays_paused_is_away(prefect_api: str, tmp_path: Path) -> None:
    async def answer() -> SiteError:
        async with asking(tmp_path, paused=True) as far:
            with pytest.raises(SiteError, match="is paused") as caught:
                await far.answer(patience_s=0.0)
            return caught.value

    error = asyncio.run(answer())
    assert error.away and not error.lost


def test_a_coordinator_that_waits_for_a_site_can_be_cancelled(prefect_api: str, tmp_path: Path) -> None:
    async def answer() -> str | None:
        async with asking(tmp_path, paused=True) as far:
            with pytest.raises(SiteError, match="the job was cancelled"):
                await far.answer(log=lambda line: far.sites.cancel())  # its first line says that it waits for the pool
            assert far.sites.cancelled
        async with get_client() as client:
            return (await client.read_flow_run(far.run)).state_name

    assert asyncio.run(answer()) == "Cancelled"


def test_the_run_of_a_site_that_missed_the_deadline_is_cancelled(prefect_api: str, tmp_path: Path) -> None:
    async def answer() -> str | None:
        async with asking(tmp_path) as far:
            with pytest.raises(SiteError, match="deadline"):
                await far.answer(deadline=time.monotonic())
            return await far.state()

    assert asyncio.run(answer()) == "Cancelled"


def test_an_unreachable_server_hangs_nobody_and_the_end_can_be_repeated(prefect_api: str, tmp_path: Path) -> None:
    name = tmp_path.name

    async def announce() -> bool:
        sites = PoolSites(["far"])
        sites.open(client_job(job_id=name), Store(tmp_path))
        with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
            # All wait for the same connection; the first to fail must not leave the others waiting.
            asked = asyncio.gather(*(sites.announce("far", number, 0) for number in range(3)), return_exceptions=True)
            errors = await asyncio.wait_for(asked, 60)
            assert all(isinstance(error, RuntimeError | httpx.HTTPError) for error in errors), errors
            await sites.end()
        async with get_client() as client:
            await client.create_work_pool(WorkPoolCreate(name=name, type="process"))
            await register_site(client, "far", name)
        announced = await sites.announce("far", 0, 0)
        await sites.end()
        await sites.end()
        return announced

    assert asyncio.run(announce())
