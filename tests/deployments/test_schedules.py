"""Overlapping runs of a deployment: what a schedule does while the last run is in progress."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.concurrency._leases import amaintain_concurrency_lease
from prefect.flow_engine import run_flow_async
from prefect.settings import temporary_settings

from fedpool import ConfigError, JobStatus, PocEnv, Store
from fedpool.deployments.overlap import chosen
from fedpool.deployments.stored_jobs import JobSummary, list_jobs
from fedpool.flows.overlap import believe_the_store, outlasting_its_slot
from fedpool.flows.staging import has_completed
from fedpool.paths import JobPaths, new_job_id
from tests.poc import GatedJob, brought_up, wait_until
from tests.records import result_of

pytestmark = pytest.mark.timeout(600)

T = TypeVar("T")
SITES = ("a", "b")


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PocEnv]:
    with brought_up(PocEnv(clients=SITES, home=tmp_path_factory.mktemp("poc"), progress=False)) as env:
        yield env


def ask(env: PocEnv, question: Callable[[PrefectClient], Awaitable[T]]) -> T:
    async def with_client() -> T:
        async with get_client() as client:
            return await question(client)

    with temporary_settings(env.settings()):
        return asyncio.run(with_client())


@contextmanager
def deployed(env: PocEnv, job: GatedJob, **options: Any) -> Iterator[DeploymentResponse]:
    """Deploy the job's recipe; the deployment is deleted after the test."""
    name = env.deploy(job.recipe, **options)
    deployment = ask(env, lambda client: client.read_deployment_by_name(name))
    try:
        yield deployment
    finally:
        ask(env, lambda client: client.delete_deployment(deployment.id))


def runs_of(env: PocEnv, deployment: DeploymentResponse) -> list[FlowRun]:
    """The deployment's runs that were due, oldest first."""
    of_it = DeploymentFilter(name=DeploymentFilterName(any_=[deployment.name]))
    found: list[FlowRun] = ask(env, lambda client: client.read_flow_runs(deployment_filter=of_it))
    return sorted((run for run in found if run.state_name != "Scheduled"), key=lambda run: str(run.expected_start_time))


def start(env: PocEnv, deployment: DeploymentResponse) -> FlowRun:
    run: FlowRun = ask(env, lambda client: client.create_flow_run_from_deployment(deployment.id))
    return run


def state_of(env: PocEnv, run: FlowRun) -> str | None:
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    (found,) = ask(env, lambda client: client.read_flow_runs(flow_run_filter=wanted))
    name: str | None = found.state_name
    return name


def jobs_called(env: PocEnv, name: str) -> list[JobSummary]:
    """The jobs with this name, oldest first."""
    return [job for job in list_jobs(env.open_store()) if job.job_id.startswith(f"{name}-")][::-1]


def wait_until_held(folder: Path) -> None:
    wait_until(lambda: all((folder / f"training-{site}").exists() for site in SITES), timeout_s=400)


@pytest.mark.slow
def test_a_schedule_skips_what_is_due_while_the_last_run_is_under_way(env: PocEnv, tmp_path: Path) -> None:
    job = GatedJob(tmp_path, SITES, name="often", hold=0, num_rounds=1)
    with deployed(env, job, schedule=timedelta(seconds=15)) as deployment:
        assert "A run that is due while another one is in progress is skipped." in str(deployment.description)
        wait_until_held(tmp_path)

        def skipped() -> list[FlowRun]:
            return [run for run in runs_of(env, deployment) if run.state_name == "Cancelled"]

        wait_until(lambda: len(skipped()) >= 3, timeout_s=400)
        assert {run.state.message for run in skipped() if run.state} == {"Deployment concurrency limit reached."}
        assert len(jobs_called(env, "often")) == 1  # the skipped runs staged no job
        job.release()
        wait_until(lambda: jobs_called(env, "often")[0].status is JobStatus.COMPLETED)
        wait_until(lambda: len(jobs_called(env, "often")) >= 2, timeout_s=400)  # the next due run is not skipped


@pytest.mark.slow
def test_with_queue_a_run_waits_for_the_one_before(env: PocEnv, tmp_path: Path) -> None:
    job = GatedJob(tmp_path, SITES, name="queued", hold=0, num_rounds=1)
    with deployed(env, job, overlap="queue") as deployment:
        assert "waits for its end" in str(deployment.description)
        first = start(env, deployment)
        wait_until_held(tmp_path)
        second = start(env, deployment)
        wait_until(lambda: state_of(env, second) == "AwaitingConcurrencySlot")
        assert len(jobs_called(env, "queued")) == 1
        job.release()
        wait_until(lambda: state_of(env, first) == state_of(env, second) == "Completed", timeout_s=400)
        assert len(jobs_called(env, "queued")) == 2


@pytest.mark.slow
def test_with_cancel_a_run_ends_the_one_before(env: PocEnv, tmp_path: Path) -> None:
    job = GatedJob(tmp_path, SITES, name="newest", hold=0, num_rounds=1)
    with deployed(env, job, overlap="cancel") as deployment:
        assert "cancels it" in str(deployment.description)
        first = start(env, deployment)
        wait_until_held(tmp_path)
        second = start(env, deployment)
        wait_until(lambda: state_of(env, first) == "Cancelled", timeout_s=400)
        (ended,) = (found for found in jobs_called(env, "newest") if found.status is not None)
        assert ended.status is JobStatus.CANCELLED
        job.release()
        wait_until(lambda: state_of(env, second) == "Completed", timeout_s=400)
        assert [found.status for found in jobs_called(env, "newest")] == [JobStatus.CANCELLED, JobStatus.COMPLETED]


@pytest.mark.slow
def test_a_deployment_that_is_made_again_has_the_new_choice(env: PocEnv, tmp_path: Path) -> None:
    job = GatedJob(tmp_path, SITES, name="changed", hold=0, num_rounds=1)
    for overlap, most in (("skip", 1), ("cancel", None), ("queue", 1), (None, None)):
        name = env.deploy(job.recipe, overlap=overlap)  # type: ignore[arg-type]  # of the choices
        found = ask(env, lambda client, name=name: client.read_deployment_by_name(name))  # type: ignore[misc]  # a default
        limit = found.global_concurrency_limit
        assert (limit.limit if limit else None) == most
        assert found.parameters["cancel_earlier"] is (overlap == "cancel")


def test_what_overlap_is_by_default_and_what_it_cannot_be() -> None:
    assert chosen(None, scheduled=True) == "skip" and chosen(None, scheduled=False) is None
    assert chosen("queue", scheduled=False) == "queue"
    with pytest.raises(ConfigError, match="overlap='wait' is not known: use 'skip', 'queue', 'cancel'"):
        chosen("wait", scheduled=True)


def test_a_run_that_loses_its_slot_goes_on_to_its_end(prefect_api: str, tmp_path: Path) -> None:
    lease, lost = uuid4(), threading.Event()
    store, job_id = Store(tmp_path), new_job_id("slotted")

    @flow(persist_result=False, flow_run_name=job_id)
    async def slotted(store: str) -> None:
        async def work() -> None:
            # The server does not know this lease: Prefect gives it up and cancels the run.
            (renewal,) = (thread for thread in threading.enumerate() if thread.name.endswith(str(lease)))
            await asyncio.to_thread(renewal.join, 60)
            lost.set()
            await asyncio.to_thread(
                Store(store).write_json, JobPaths(job_id).result, result_of({"job_id": job_id}).as_json()
            )

        async with amaintain_concurrency_lease(lease, 300, raise_on_lease_renewal_failure=True):
            await outlasting_its_slot(work())

    async def run_and_read() -> str | None:
        async with get_client() as client:
            run = await client.create_flow_run(slotted, parameters={"store": store.url}, name=job_id)
            with pytest.raises(asyncio.CancelledError):
                await run_flow_async(slotted, flow_run=run, parameters={"store": store.url})
            await believe_the_store(client, await client.read_flow_run(run.id))  # as the coordinator's worker does
            name: str | None = (await client.read_flow_run(run.id)).state_name
            return name

    assert asyncio.run(run_and_read()) == "Completed"
    assert lost.is_set() and has_completed(store, job_id)
