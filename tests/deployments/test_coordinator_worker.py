"""The coordinator's worker: it runs fedpool's jobs, and never anything else that it receives."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Scheduled

from fedpool import ConfigError, ProdEnv
from fedpool.flows.deployed import deployed
from fedpool.flows.fedavg import FedAvgRecipe
from tests.asked import final_state, run_deployment, state_of
from tests.poc import GatedJob, Worker, processes_of, wait_until, wait_until_gone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

POOL = "guarded"
SECRET = "the-secret-of-the-coordinator"
FEDAVG = "fedpool.flows.entrypoints.fedavg"
WAITS = "waiting, too many sites can't take part"


class Coordinator:
    """A coordinator's worker that has a store and a secret."""

    def __init__(self, api_url: str, folder: Path, *command: str, pool: str = POOL) -> None:
        self.store = folder / "store"
        own = ("fedpool.cli", "coordinator", "start", "--pool", pool, "--store", str(self.store))
        self.worker = Worker(api_url, folder / "worker", *(command or own), AWS_SECRET_ACCESS_KEY=SECRET)


@pytest.fixture(scope="module")
def coordinator(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """A coordinator that is shared by the tests that do it no harm."""
    made = Coordinator(prefect_api, tmp_path_factory.mktemp("coordinator"))
    try:
        made.worker.wait_until_started()
        yield made
        assert made.worker.process.poll() is None  # it has survived everything that it received
    finally:
        made.worker.end()


@flow(name="federated-job")
def claims_to_be_a_job() -> None:
    """Never runs."""


def parameters(store: Path) -> dict[str, Any]:
    """Parameters of a run whose sites do not exist, so that it waits for them."""
    return {"template": "none", "store": str(store), "sites": ["nowhere"], "min_clients": 1, "num_rounds": 1}


class Attack:
    """A deployment in the coordinator's pool. Everything in it writes the secret to a file."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.canary = folder / "canary"
        steal = f"import os, pathlib; pathlib.Path({str(self.canary)!r}).write_text(str(dict(os.environ)))"
        (folder / "evil.py").write_text(f"{steal}\nfrom prefect import flow\n\n@flow\ndef evil(**_):\n    pass\n")
        (folder / "sitecustomize.py").write_text(steal)
        (folder / "fedpool.py").write_text(steal)
        shell = f"sh -c 'env > {self.canary}'"
        self.variables: dict[str, Any] = {
            "command": shell,
            "env": {
                "PYTHONPATH": str(folder),
                "BASH_ENV": str(folder / "evil.py"),
                "PREFECT__FLOW_ENTRYPOINT": "evil.py:evil",
            },
            "working_dir": str(folder),
            "image": "registry.example/evil",
        }
        self.template = {
            "job_configuration": {**self.variables, "stream_output": True},
            "variables": {"type": "object", "properties": {}},
        }
        self._folder = folder
        self._steps = [
            {"prefect.deployments.steps.run_shell_script": {"script": shell}},
            {"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}},
        ]
        self.parameters = parameters(store)

    def deploy(self, entrypoint: str, name: str) -> str:
        async def create() -> UUID:
            async with get_client() as client:
                deployment: UUID = await client.create_deployment(
                    flow_id=await client.create_flow(claims_to_be_a_job),
                    name=name,
                    work_pool_name=POOL,
                    entrypoint=entrypoint,
                    path=str(self._folder),
                    pull_steps=self._steps,
                    job_variables=self.variables,
                )
                return deployment

        asyncio.run(create())
        return f"federated-job/{name}"

    def run(self, entrypoint: str, *, patience_s: float = 0, **more: Any) -> FlowRun:
        """Start a run of such a deployment, with job variables of its own."""
        own = {**self.parameters, "site_patience_s": patience_s, **more}
        return run_deployment(self.deploy(entrypoint, self.canary.parent.name), own, job_variables=self.variables)

    def check_has_failed(self) -> None:
        assert not self.canary.exists(), f"the attacker has the secret: {SECRET in self.canary.read_text()}"


@pytest.fixture
def attack(coordinator: Coordinator, tmp_path: Path) -> Iterator[Attack]:
    made = Attack(tmp_path, coordinator.store)
    yield made
    made.check_has_failed()


@pytest.mark.parametrize(
    "entrypoint",
    [
        "evil.py:evil",
        "fedpool.flows.entrypoints.evil",
        "fedpool.flows.entrypoints:fedavg",
        "fedpool.flows.entrypoints.own(a);evil",
        "os.system",
    ],
)
def test_a_flow_that_is_not_fedpools_is_refused(entrypoint: str, attack: Attack) -> None:
    state = final_state(attack.run(entrypoint), 400)
    assert state.is_crashed()
    assert f"only fedpool's recipes, but the entrypoint of this run's deployment is {entrypoint!r}" in str(
        state.message
    )


def test_a_run_without_a_deployment_is_refused(attack: Attack) -> None:
    async def start() -> FlowRun:
        async with get_client() as client:
            run: FlowRun = await client.create_flow_run(
                claims_to_be_a_job, state=Scheduled(), work_pool_name=POOL, job_variables=attack.variables
            )
            return run

    state = final_state(asyncio.run(start()), 400)
    assert state.is_crashed() and "the entrypoint of this run's deployment is None" in str(state.message)


def test_for_a_known_flow_nothing_of_the_deployment_is_executed(attack: Attack) -> None:
    state = final_state(attack.run(FEDAVG), 400)
    assert state.is_failed() and "0 of 1 sites can take part" in str(state.message)


def test_nor_is_anything_of_the_pools_template(attack: Attack) -> None:
    async def patch(template: dict[str, Any]) -> None:
        async with get_client() as client:
            await client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))

    asyncio.run(patch(attack.template))
    try:
        state = final_state(attack.run(FEDAVG), 400)
    finally:
        asyncio.run(patch({}))
    assert state.is_failed() and "0 of 1 sites can take part" in str(state.message)


def test_cancelling_a_run_loads_nothing_of_its_deployment(attack: Attack, coordinator: Coordinator) -> None:
    run = attack.run(FEDAVG, patience_s=600)
    wait_for_sites(coordinator.worker)

    async def cancel() -> None:
        async with get_client() as client:
            await client.set_flow_run_state(run.id, State(type=StateType.CANCELLING))

    asyncio.run(cancel())
    assert final_state(run, 400).is_cancelled()
    wait_until(lambda: jobs_of(coordinator.worker) == [], timeout_s=400)


def test_a_run_that_names_another_store_is_refused(attack: Attack, tmp_path: Path) -> None:
    state = final_state(attack.run(FEDAVG, store="http://127.0.0.1:9"), 400)
    assert state.is_crashed()
    assert "the run names the store 'http://127.0.0.1:9', but this coordinator runs only jobs in file://" in str(
        state.message
    )


def test_fields_that_make_no_flow_crash_their_run_alone(attack: Attack) -> None:
    assert final_state(attack.run("fedpool.flows.entrypoints.own(a,a)"), 400).is_crashed()


def wait_for_sites(worker: Worker, runs: int = 1) -> None:
    """Block until this many runs wait for their sites."""
    wait_until(lambda: worker.log.count(WAITS) >= runs, timeout_s=400, over=lambda: worker.process.poll() is not None)


def jobs_of(worker: Worker) -> list[psutil.Process]:
    """The processes of the jobs that a coordinator runs."""
    return list(psutil.Process(worker.process.pid).children())


@pytest.fixture
def own_coordinator(prefect_api: str, tmp_path: Path) -> Iterator[Callable[..., Coordinator]]:
    """Starts a coordinator, with our command or another one."""
    made: list[Coordinator] = []

    def start(pool: str, *command: str) -> Coordinator:
        made.append(Coordinator(prefect_api, tmp_path / f"{len(made)}", *command, pool=pool))
        return made[-1]

    yield start
    for coordinator in made:
        coordinator.worker.end()


def waiting_run(pool: str, store: Path) -> FlowRun:
    """A run of a real deployment, which waits for its sites."""

    async def create() -> None:
        async with get_client() as client:
            await client.create_deployment(
                flow_id=await client.create_flow(deployed(FedAvgRecipe)),
                name=pool,
                work_pool_name=pool,
                entrypoint=FEDAVG,
            )

    asyncio.run(create())
    return run_deployment(f"federated-job/{pool}", {**parameters(store), "site_patience_s": 600})


def test_a_job_whose_process_is_killed_crashes_and_the_worker_goes_on(
    own_coordinator: Callable[..., Coordinator],
) -> None:
    coordinator = own_coordinator("killed")
    coordinator.worker.wait_until_started()
    run = waiting_run("killed", coordinator.store)
    wait_for_sites(coordinator.worker)
    (process,) = jobs_of(coordinator.worker)
    process.kill()
    state = final_state(run, 400)
    assert state.is_crashed() and "Process exited with status code: -9" in str(state.message)
    again = waiting_run("killed", coordinator.store)
    wait_for_sites(coordinator.worker, runs=2)
    assert state_of(again).is_running()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_worker_and_its_jobs(
    number: signal.Signals, own_coordinator: Callable[..., Coordinator]
) -> None:
    pool = f"ended-by-{number.name.lower()}"
    coordinator = own_coordinator(pool)
    coordinator.worker.wait_until_started()
    waiting_run(pool, coordinator.store)
    wait_for_sites(coordinator.worker)
    coordinator.worker.process.send_signal(number)
    assert coordinator.worker.process.wait(60) == 0
    wait_until_gone(processes_of, coordinator.worker.folder)
    assert "Traceback" not in coordinator.worker.log


def test_prefects_own_command_starts_a_coordinator_too(own_coordinator: Callable[..., Coordinator]) -> None:
    stock = ("prefect", "worker", "start", "--type", "fedpool-coordinator", "--pool", "stock-command")
    coordinator = own_coordinator("stock-command", *stock)
    coordinator.worker.wait_until_started()
    waiting_run("stock-command", coordinator.store)
    wait_for_sites(coordinator.worker)


def test_a_pool_of_another_type_is_refused_by_the_worker_and_by_the_submission(
    own_coordinator: Callable[..., Coordinator], prefect_api: str, tmp_path: Path
) -> None:
    async def create() -> None:
        async with get_client() as client:
            await client.create_work_pool(WorkPoolCreate(name="of-processes", type="process"))

    asyncio.run(create())
    remedy = "`prefect work-pool delete of-processes` and `fedpool coordinator start --pool of-processes`"
    worker = own_coordinator("of-processes").worker
    wait_until(lambda: worker.process.poll() is not None, timeout_s=400)
    said = " ".join(worker.log.split())
    assert worker.process.returncode == 1 and "Traceback" not in said
    assert "work pool 'of-processes' has the type 'process', whose workers run any command" in said and remedy in said
    env = ProdEnv(
        api_url=prefect_api,
        store=str(tmp_path / "store"),
        sites=("a",),
        coordinator_pool="of-processes",
        progress=False,
    )
    with pytest.raises(ConfigError, match="work pool 'of-processes' has the type 'process'") as caught:
        GatedJob(tmp_path / "job", ("a",)).recipe.execute(env=env)
    assert remedy in str(caught.value)
