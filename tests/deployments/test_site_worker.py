"""The site's worker: what it does with valid requests, and that it never runs anything else that it
receives.
"""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import State

from fedpool.deployments.prefect_desk import register_site
from fedpool.flows.site_round import site_round
from tests.asked import AskedJob, final_state, run_deployment, state_of
from tests.poc import Worker, processes_of, scripts_of, wait_until, wait_until_gone
from tests.services import FAKETIME_MISSING, clock_off_by, find_faketime

pytestmark = pytest.mark.slow


@pytest.fixture
def site_worker(prefect_api: str, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts `fedpool site start --name NAME` or another command, and ends it after the test."""
    workers = []

    def start(name: str, *command: str, **variables: str) -> Worker:
        folder = tmp_path / "sites" / name
        own = ("fedpool.cli", "site", "start", "--name", name, "--folder", str(folder))
        store = {"FEDPOOL_SITE_STORE": str(tmp_path / "job/store")}
        worker = Worker(prefect_api, folder, *(command or own), **store | variables)
        workers.append(worker)
        return worker.wait_until_started()

    yield start
    for worker in workers:
        worker.end()


@pytest.fixture(scope="module")
def hospital(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A site's worker, shared by the tests that do it no harm."""
    folder = tmp_path_factory.mktemp("hospital")
    command = ("site", "start", "--name", "hospital", "--folder", str(folder), "--store", str(folder / "store"))
    worker = Worker(prefect_api, folder, "fedpool.cli", *command)
    try:
        yield worker.wait_until_started()
        assert worker.process.poll() is None  # it has survived everything that it received
    finally:
        worker.end()


def test_the_script_stays_warm_between_rounds_and_ends_with_the_job(hospital: Worker, tmp_path: Path) -> None:
    job = AskedJob(tmp_path, "hospital", store=hospital.folder / "store")
    for round in (0, 1):
        state = final_state(job.ask(round))
        assert state.name == "Completed" and state.message == f"hospital finished its part of round {round}"
    assert job.pid(0) == job.pid(1)
    assert scripts_of(tmp_path) != []
    job.end()
    wait_until((tmp_path / "ended").exists, timeout_s=30)
    wait_until_gone(scripts_of, tmp_path, 30)


@flow(name="wanted-by-someone")
def other_flow() -> None:
    """Never runs."""


def deploy_evil(of: Any, name: str, folder: Path, canary: Path) -> UUID:
    """A deployment in the hospital's pool; all of its code touches a file as soon as it runs."""
    touch = f"open({str(canary)!r}, 'a').close()"
    (folder / "evil.py").write_text(f"{touch}\nfrom prefect import flow\n\n@flow\ndef evil(**_):\n    {touch}\n")
    (folder / "sitecustomize.py").write_text(touch)

    async def create() -> UUID:
        async with get_client() as client:
            deployment: UUID = await client.create_deployment(
                flow_id=await client.create_flow(of),
                name=name,
                work_pool_name="hospital",
                entrypoint=f"{folder / 'evil.py'}:evil",
                path=str(folder),
                pull_steps=[
                    {"prefect.deployments.steps.run_shell_script": {"script": f"touch {canary}"}},
                    {"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}},
                ],
                job_variables={
                    "command": f"touch {canary}",
                    "env": {"PYTHONPATH": str(folder), "BASH_ENV": str(folder / "evil.py")},
                },
            )
            return deployment

    return asyncio.run(create())


def test_a_run_of_another_flow_is_refused_and_none_of_its_code_runs(hospital: Worker, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    deploy_evil(other_flow, "evil", tmp_path, canary)
    variables = {"command": f"touch {canary}", "env": {"PYTHONPATH": str(tmp_path)}}
    state = final_state(run_deployment("wanted-by-someone/evil", {}, job_variables=variables))
    assert state.is_crashed()
    assert "this site runs only site-round: the run of 'wanted-by-someone' was refused" in str(state.message)
    assert not canary.exists()


def test_a_deployment_that_calls_itself_site_round_brings_no_code_of_its_own(hospital: Worker, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    deploy_evil(site_round, "evil", tmp_path, canary)
    without = final_state(run_deployment("site-round/evil", {}))
    assert without.is_crashed()
    assert "site-round takes attempt, job_id, round, site, store: a run with no parameters was refused" in str(
        without.message
    )
    asked = {"job_id": "a", "site": "hospital", "round": -1, "attempt": 0, "store": str(tmp_path)}
    before = final_state(run_deployment("site-round/evil", asked))
    assert before.is_failed() and "round: must be greater than or equal to 0, got -1" in str(before.message)
    elsewhere = final_state(run_deployment("site-round/evil", asked | {"site": "clinic", "round": 0}))
    assert elsewhere.is_failed()
    assert "clinic, round 0: this is hospital: the run was sent to the wrong work pool" in str(elsewhere.message)
    upwards = final_state(run_deployment("site-round/evil", asked | {"job_id": "../a", "round": 0}))
    assert upwards.is_failed() and "'../a' cannot be part of a path" in str(upwards.message)
    # For a valid request, the site's own site_round runs, whatever the deployment says.
    job = AskedJob(tmp_path / "job", "hospital", store=hospital.folder / "store")
    assert final_state(job.ask(deployment="site-round/evil")).is_completed()
    assert not canary.exists()
    job.end()


def test_a_bundle_that_is_not_what_its_name_says_is_refused(hospital: Worker, tmp_path: Path) -> None:
    job = AskedJob(tmp_path, "hospital", store=hospital.folder / "store")
    (bundle,) = Path(job.store.full(job.paths.job_id)).glob("bundle-*.zip")
    bundle.write_bytes(bundle.read_bytes() + b" ")
    state = final_state(job.ask())
    assert state.is_failed() and "hospital, round 0: the store failed" in str(state.message)
    assert not (tmp_path / "training").exists()
    job.end()


def test_a_cancelled_run_ends_its_script_in_seconds(hospital: Worker, tmp_path: Path) -> None:
    job = AskedJob(tmp_path, "hospital", store=hospital.folder / "store", gated=True)
    run = job.ask()
    job.wait_until_training()

    async def cancel() -> None:
        async with get_client() as client:
            await client.set_flow_run_state(run.id, State.model_validate({"type": "CANCELLING"}))

    asyncio.run(cancel())
    wait_until_gone(scripts_of, tmp_path, 30)
    assert final_state(run, 30).name == "Cancelled"
    job.end()


def test_sigterm_in_mid_training_ends_worker_and_script_and_hands_the_run_back(
    site_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = site_worker("leaves")
    job = AskedJob(tmp_path / "job", "leaves", gated=True)
    run = job.ask()
    job.wait_until_training()
    worker.process.terminate()
    worker.process.wait(300)
    assert worker.process.returncode == 0 and "KeyboardInterrupt" not in worker.log
    wait_until_gone(processes_of, worker.folder)
    wait_until_gone(scripts_of, tmp_path)
    state = state_of(run)
    assert state.is_crashed() and state.message == "the site was stopped before it finished its part"
    assert not list(worker.folder.glob(".fedpool-*"))


def test_a_run_that_a_killed_worker_left_behind_crashes_when_the_worker_comes_back(
    site_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = site_worker("returns")
    job = AskedJob(tmp_path / "job", "returns", gated=True)
    run = job.ask()
    job.wait_until_training()
    worker.process.kill()
    worker.process.wait()
    wait_until_gone(scripts_of, tmp_path, 30)  # ended by its guard, not by the worker
    assert state_of(run).is_running()
    site_worker("returns")
    state = final_state(run, 60)
    assert state.is_crashed() and state.message == "the worker of returns was lost during its part of the round"
    job.release()
    assert final_state(job.ask(1)).is_completed()  # and the next round works as usual
    job.end()


def test_prefects_own_command_starts_a_site_worker_too(site_worker: Callable[..., Worker], tmp_path: Path) -> None:
    worker = site_worker(
        "stock", "prefect", "worker", "start", "--type", "fedpool-site", "--pool", "stock",
        FEDPOOL_SITE_FOLDER=str(tmp_path / "folder"), FEDPOOL_SITE_CONFIG='{"data": "here"}',
    )  # fmt: skip
    job = AskedJob(tmp_path / "job", "stock")
    assert final_state(job.ask()).is_completed()
    job.end()
    worker.process.terminate()
    worker.process.wait(300)
    wait_until_gone(processes_of, tmp_path / "folder")
    assert not list((tmp_path / "folder").glob(".fedpool-*"))


def test_site_round_runs_cold_in_a_stock_process_pool(site_worker: Callable[..., Worker], tmp_path: Path) -> None:
    async def register() -> None:
        async with get_client() as client:
            await client.create_work_pool(WorkPoolCreate(name="any-processes", type="process"))
            await register_site(client, "cold", "any-processes")

    asyncio.run(register())
    site_worker(
        "cold", "prefect", "worker", "start", "--type", "process", "--pool", "any-processes",
        FEDPOOL_SITE_FOLDER=str(tmp_path / "folder"),
    )  # fmt: skip
    job = AskedJob(tmp_path / "job", "cold")
    state = final_state(job.ask())
    assert state.is_completed(), state
    assert job.pid() > 0
    wait_until_gone(scripts_of, tmp_path)
    assert not list((tmp_path / "folder").glob(".fedpool-*"))


@pytest.mark.parametrize("seconds", [-120, 120])
def test_a_site_whose_clock_is_off_counts_as_online_and_takes_its_runs_at_once(
    seconds: int, site_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    if find_faketime() is None:
        pytest.skip(FAKETIME_MISSING)
    name = f"off-{abs(seconds)}-{'behind' if seconds < 0 else 'ahead'}"
    worker = site_worker(name, **clock_off_by(seconds))
    which = "behind" if seconds < 0 else "ahead of"
    wait_until(lambda: f"s {which} that of the Prefect server" in worker.log)

    async def status() -> list[str]:
        async with get_client() as client:
            return [record.status for record in await client.read_workers_for_work_pool(name)]

    assert asyncio.run(status()) == ["ONLINE"]
    job = AskedJob(tmp_path / "job", name)
    assert final_state(job.ask(), timeout_s=90).is_completed()  # by the site's clock, it was due later than that
    job.end()
