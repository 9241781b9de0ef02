"""What a handle reports about a job whose run is gone, or that no process runs any more: the store
is the source of truth, and the handle says what to do.
"""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import State, StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Failed, Pending, Running, Scheduled

from fedpool import JobCancelled, JobFailed, JobStatus, PocEnv, Run
from fedpool.deployments import following
from fedpool.deployments.following import cancel_run, follow
from fedpool.flows.entrypoints import fedavg
from fedpool.paths import JobPaths
from fedpool.store import Store
from tests.poc import GatedJob, processes_of, wait_until, wait_until_gone

HOLD = """
import sys
from fedpool.store import Store
with Store(sys.argv[1]).held(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def job(run_job: Callable[..., Run], tmp_path: Path) -> tuple[Store, str]:
    """A job that has committed two of its three rounds and has no result."""
    run = run_job(num_rounds=3)
    store, paths = Store(tmp_path / "runs"), JobPaths(run.job_id)
    store.remove(paths.result)
    shutil.rmtree(store.full(paths.round(2)))
    return store, run.job_id


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_API_POLL_S", 0.1)
    monkeypatch.setattr(following, "_ABANDONED_S", 0.5)


def in_prefect(prefect_api: str, use: Callable[[PrefectClient], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        async with get_client() as client:
            return await use(client)

    with temporary_settings({PREFECT_API_URL: prefect_api}):
        return asyncio.run(run())


def make_run(prefect_api: str, job_id: str, state: State[Any]) -> UUID:
    """Create a run of the job in the given state; returns its id."""

    async def make(client: PrefectClient) -> UUID:
        run = await client.create_flow_run(fedavg, name=job_id)
        await client.set_flow_run_state(run.id, state, force=True)
        id: UUID = run.id
        return id

    found: UUID = in_prefect(prefect_api, make)
    return found


def handle(prefect_api: str, store: Store, job_id: str, run_id: UUID) -> Run:
    """What `execute` returns for a job that runs elsewhere."""

    def work() -> None:
        in_prefect(prefect_api, lambda client: follow(client, run_id, store, job_id))

    return Run(
        job_id, store, work=work, cancel=lambda: in_prefect(prefect_api, lambda client: cancel_run(client, run_id))
    )


@contextmanager
def held(store: Store, job_id: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the job's folder, as a coordinator does."""
    command = [sys.executable, "-c", HOLD, store.root, job_id]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


LOST = (
    r"job \S+ was lost after 2 committed rounds: {}. "
    r"Resume it with recipe.execute\(env, resume='\S+'\) or `fedpool job resume"
)


def test_a_run_that_was_deleted_means_that_the_job_is_lost(prefect_api: str, job: tuple[Store, str]) -> None:
    run = handle(prefect_api, *job, run_id=uuid4())
    with pytest.raises(JobFailed, match=LOST.format("its run is gone from the Prefect server.*")):
        run.get_result(60)
    assert run.get_status() is JobStatus.FAILED
    run.abort()  # harmless


def test_a_result_is_the_truth_whatever_has_become_of_the_run(prefect_api: str, run_job: Callable[..., Run]) -> None:
    done = run_job()
    run = handle(prefect_api, Store(str(Path(done.path).parent)), done.job_id, uuid4())
    assert run.get_result(60).num_rounds == 2 and run.get_status() is JobStatus.COMPLETED


def test_a_deleted_run_whose_coordinator_still_works_is_waited_for(prefect_api: str, job: tuple[Store, str]) -> None:
    with held(*job) as coordinator:
        run = handle(prefect_api, *job, run_id=uuid4())
        assert not run.wait(3) and run.get_status() is JobStatus.RUNNING
        run.abort()  # allowed, and harmless
        coordinator.kill()
        with pytest.raises(JobFailed, match=LOST.format(".*gone from the Prefect server.*")):
            run.get_result(60)


def test_a_run_that_prefect_shows_as_running_and_nobody_runs_is_lost(prefect_api: str, job: tuple[Store, str]) -> None:
    run_id = make_run(prefect_api, job[1], Running())
    with held(*job) as coordinator:
        run = handle(prefect_api, *job, run_id=run_id)
        assert not run.wait(3)
        coordinator.kill()
        with pytest.raises(
            JobFailed, match=LOST.format("no process runs it any more, although Prefect shows its run as Running")
        ):
            run.get_result(60)


@pytest.mark.parametrize("state", [Scheduled(), Pending(), Running()])
def test_a_run_that_has_not_begun_yet_is_waited_for(
    state: State[Any], prefect_api: str, job: tuple[Store, str]
) -> None:
    run_id = make_run(prefect_api, job[1], state)
    run = handle(prefect_api, *job, run_id=run_id)
    assert not run.wait(3)
    in_prefect(prefect_api, lambda client: client.set_flow_run_state(run_id, Failed(message="over"), force=True))
    with pytest.raises(JobFailed, match=LOST.format(r"its run ended without a result \(Failed: over\).*")):
        run.get_result(60)


@pytest.mark.parametrize("state", [Scheduled(), Pending()])
def test_a_job_that_is_aborted_before_it_has_begun_is_cancelled(
    state: State[Any], prefect_api: str, job: tuple[Store, str]
) -> None:
    run = handle(prefect_api, *job, run_id=make_run(prefect_api, job[1], state))
    run.abort()
    with pytest.raises(JobCancelled, match="was cancelled before it began"):
        run.get_result(60)
    assert run.get_status() is JobStatus.CANCELLED


def test_a_run_that_prefect_would_cancel_for_ever_is_cancelled(prefect_api: str, job: tuple[Store, str]) -> None:
    """The state in which Prefect leaves a run that is cancelled in the UI while it is pending."""
    run_id = make_run(prefect_api, job[1], State(type=StateType.CANCELLING))
    with pytest.raises(JobCancelled, match="was cancelled before it began"):
        handle(prefect_api, *job, run_id=run_id).get_result(60)
    assert in_prefect(prefect_api, lambda client: client.read_flow_run(run_id)).state.is_cancelled()


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PocEnv]:
    """A proof of concept with an in-memory database and a store in a folder."""
    home = tmp_path_factory.mktemp("poc")
    env = PocEnv(num_clients=2, home=home, progress=False)
    try:
        env.up()
        yield env
    finally:
        env.down()
        wait_until_gone(processes_of, home)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["the run is deleted", "the server loses its database"])
def test_a_job_whose_run_is_gone_says_so_and_goes_on(how: str, env: PocEnv, tmp_path: Path) -> None:
    env.up()
    job = GatedJob(tmp_path, env.names)
    with job.started(env) as run:
        job.wait_until_held(run)
        if how == "the run is deleted":

            async def delete(client: PrefectClient) -> None:
                from fedpool.deployments.job_runs import find_run

                await client.delete_flow_run((await find_run(client, run.job_id)).id)

            with temporary_settings(env.settings()):
                in_prefect(env.api_url, delete)
        else:
            (server,) = [service for service in env.status() if service.name == "server"]
            subprocess.run(["kill", "-9", str(server.pid)], check=True)
            wait_until(lambda: not any(service.healthy for service in env.status() if service.name == "server"))
            env.up()
        with pytest.raises(JobFailed, match=r"gone from the Prefect server"):
            run.get_result(120)
        assert run.get_status() is JobStatus.FAILED
    job.release()
    result = job.recipe.execute(env, resume=run.job_id).get_result()
    assert result.num_rounds == 3 and result.params["w"].tolist() == [3, 3, 3]
