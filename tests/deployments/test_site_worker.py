"""The site's worker: what it does with valid requests, and that it never runs anything else that it
receives.
"""

import asyncio
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State
from safetensors.numpy import load

from fedpool import FedAvgRecipe, Store
from fedpool.deployments.prefect_desk import register_site
from fedpool.flows.site_round import site_round
from fedpool.flows.staging import stage
from fedpool.messages import SiteAssignment
from fedpool.paths import JobPaths, new_job_id
from tests.poc import Worker, processes_of, scripts_of, wait_until, wait_until_gone
from tests.services import FAKETIME_MISSING, clock_off_by, find_faketime

pytestmark = pytest.mark.slow

# Touches `training`, waits for the file `go`, then sends its process id.
SCRIPT = """
    import os, pathlib, sys, threading
    import numpy as np
    import fedpool.client as flare

    flare.init()
    folder = pathlib.Path(sys.argv[1])
    while flare.is_running():
        model = flare.receive()
        (folder / "training").touch()
        while not (folder / "go").exists():
            threading.Event().wait(0.05)
        flare.send(flare.FLModel(params={"w": np.full(1, os.getpid(), np.float32)}))
    (folder / "ended").touch()
"""


class Job:
    """A staged job coordinated by the test, which asks a site for rounds and reads the results from
    the store.

    Args:
        folder: for the store, the script and the gate.
        site: the job's only site.
        gated: whether training waits for `release()`.
    """

    def __init__(self, folder: Path, site: str, *, gated: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "client.py"
        script.write_text(textwrap.dedent(SCRIPT))
        self.folder = folder
        self.site = site
        self.store = Store(folder / "store")
        self.paths = JobPaths(new_job_id("asked"))
        self.recipe = FedAvgRecipe(
            name="asked",
            min_clients=1,
            num_rounds=9,
            model={"w": np.zeros(1, np.float32)},
            train_script=script,
            train_args=[str(folder)],
        )
        stage(self.recipe, self.paths.job_id, self.store, (site,))
        if not gated:
            self.release()

    def release(self) -> None:
        (self.folder / "go").touch()

    def wait_until_training(self) -> None:
        wait_until((self.folder / "training").exists)

    def ask(self, round: int = 0, deployment: str | None = None) -> FlowRun:
        """Write the assignment of a round and create its run, from the site's own deployment or
        another one.
        """
        model = self.recipe.model.digest
        if round > 0:  # every round starts from the same model
            self.store.write_bytes(self.paths.global_model(round), self.store.read_bytes(self.paths.global_model(0)))
        assignment = SiteAssignment(
            site=self.site, round=round, task="train", base_sha256=model.sha256, base_size=model.size, timeout_s=None
        )
        self.store.write_json(self.paths.assignment(round, self.site), assignment.model_dump(mode="json"))
        parameters = {
            "job_id": self.paths.job_id,
            "site": self.site,
            "round": round,
            "attempt": 0,
            "store": self.store.url,
        }
        return run_deployment(deployment or f"site-round/{self.site}", parameters)

    def pid(self, round: int = 0) -> float:
        """The process id that the script sent."""
        return float(load(self.store.read_bytes(self.paths.update(round, self.site)))["w"][0])

    def end(self) -> None:
        """End the job, as its coordinator does."""
        self.store.write_json(self.paths.result, {"status": "COMPLETED"})


def run_deployment(name: str, parameters: dict[str, Any], **settings: Any) -> FlowRun:
    async def create() -> FlowRun:
        async with get_client() as client:
            deployment = await client.read_deployment_by_name(name)
            run: FlowRun = await client.create_flow_run_from_deployment(
                deployment.id, parameters=parameters, **settings
            )
            return run

    return asyncio.run(create())


def state_of(run: FlowRun) -> State[Any]:
    async def read() -> State[Any]:
        async with get_client() as client:
            state = (await client.read_flow_run(run.id)).state
            assert state is not None
            return state

    return asyncio.run(read())


def final_state(run: FlowRun, timeout_s: float = 120) -> State[Any]:
    """Wait for a run to end; returns its final state."""
    wait_until(lambda: state_of(run).is_final(), timeout_s=timeout_s)
    return state_of(run)


@pytest.fixture
def site_worker(prefect_api: str, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts `fedpool site start --name NAME` or another command, and ends it after the test."""
    workers = []

    def start(name: str, *command: str, **variables: str) -> Worker:
        folder = tmp_path / "sites" / name
        own = ("fedpool.cli", "site", "start", "--name", name, "--folder", str(folder))
        worker = Worker(prefect_api, folder, *(command or own), **variables)
        workers.append(worker)
        return worker.wait_until_started()

    yield start
    for worker in workers:
        worker.end()


@pytest.fixture(scope="module")
def hospital(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A site's worker, shared by the tests that do it no harm."""
    folder = tmp_path_factory.mktemp("hospital")
    worker = Worker(prefect_api, folder, "fedpool.cli", "site", "start", "--name", "hospital", "--folder", str(folder))
    try:
        yield worker.wait_until_started()
        assert worker.process.poll() is None  # it has survived everything that it received
    finally:
        worker.end()


def test_the_script_stays_warm_between_rounds_and_ends_with_the_job(hospital: Worker, tmp_path: Path) -> None:
    job = Job(tmp_path, "hospital")
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
    assert before.is_failed() and "round: Input should be greater than or equal to 0" in str(before.message)
    elsewhere = final_state(run_deployment("site-round/evil", asked | {"site": "clinic", "round": 0}))
    assert elsewhere.is_failed()
    assert "clinic, round 0: this is hospital: the run was sent to the wrong work pool" in str(elsewhere.message)
    upwards = final_state(run_deployment("site-round/evil", asked | {"job_id": "../a", "round": 0}))
    assert upwards.is_failed() and "'../a' cannot be part of a path" in str(upwards.message)
    # For a valid request, the site's own site_round runs, whatever the deployment says.
    job = Job(tmp_path / "job", "hospital")
    assert final_state(job.ask(deployment="site-round/evil")).is_completed()
    assert not canary.exists()
    job.end()


def test_a_bundle_that_is_not_what_its_name_says_is_refused(hospital: Worker, tmp_path: Path) -> None:
    job = Job(tmp_path, "hospital")
    (bundle,) = Path(job.store.full(job.paths.job_id)).glob("bundle-*.zip")
    bundle.write_bytes(bundle.read_bytes() + b" ")
    state = final_state(job.ask())
    assert state.is_failed() and "hospital, round 0: the store failed" in str(state.message)
    assert not (tmp_path / "training").exists()
    job.end()


def test_a_cancelled_run_ends_its_script_in_seconds(hospital: Worker, tmp_path: Path) -> None:
    job = Job(tmp_path, "hospital", gated=True)
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
    job = Job(tmp_path / "job", "leaves", gated=True)
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
    job = Job(tmp_path / "job", "returns", gated=True)
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
    job = Job(tmp_path / "job", "stock")
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
    job = Job(tmp_path / "job", "cold")
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
    job = Job(tmp_path / "job", name)
    assert final_state(job.ask(), timeout_s=90).is_completed()  # by the site's clock, it was due later than that
    job.end()
