"""The proof of concept: real servers, workers and scripts on this machine, and what happens to a
job when one of them dies.
"""

import asyncio
import json
import os
import runpy
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import numpy as np
import psutil
import pytest
import torch
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.settings import temporary_settings
from prefect.states import AwaitingRetry
from pydantic import ValidationError

from fedpool import ConfigError, FedAvgRecipe, JobCancelled, JobFailed, JobStatus, PocEnv, Run, SimEnv
from fedpool.cli import main
from fedpool.deployments.job_runs import find_run
from fedpool.deployments.stored_jobs import list_jobs
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.store import Store
from tests import algorithms
from tests.poc import GatedJob, brought_up, prefect, processes_of, scripts_of, wait_until, wait_until_gone
from tests.services import PostgresServer, S3Server

pytestmark = pytest.mark.slow

SITES = ("site-1", "site-2", "site-3")
HELLO_PT = Path(__file__).parents[2] / "examples" / "hello-pt"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("poc")


@pytest.fixture(scope="module")
def shared(home: Path, postgres: PostgresServer) -> Iterator[PocEnv]:
    """A proof of concept with every option; the tests here share it, and some damage it."""
    with brought_up(PocEnv(num_clients=3, database=postgres.new_database(), s3=True, home=home, progress=False)) as env:
        yield env


@pytest.fixture
def env(shared: PocEnv) -> PocEnv:
    """The shared proof of concept, repaired."""
    shared.up()
    return shared


@pytest.fixture(scope="module")
def hello_pt() -> FedAvgRecipe:
    """The example's model and script, for two rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HELLO_PT))
        network = runpy.run_path(str(HELLO_PT / "model.py"))["SimpleNetwork"]
        torch.manual_seed(0)
        return FedAvgRecipe(
            name="hello-pt",
            min_clients=3,
            num_rounds=2,
            model=network(),
            train_script=HELLO_PT / "client.py",
            train_args="--batch_size 32 --epochs 1",
        )


def models_of(run: Run) -> list[bytes]:
    """The bytes of a job's global models, in round order."""
    paths = JobPaths(run.job_id)
    return [run._store.read_bytes(paths.global_model(round)) for round in range(run.get_result().num_rounds + 1)]


def pid_of(env: PocEnv, name: str) -> int:
    pid = next(service.pid for service in env.status() if service.name == name)
    assert pid is not None
    return pid


def kill(pid: int) -> None:
    """Kill a process and wait until it is gone."""
    process = psutil.Process(pid)
    process.kill()
    process.wait(300)


def kill_coordinators(env: PocEnv) -> None:
    """Kill the processes of the jobs' flows, but not the worker that started them."""
    coordinators = psutil.Process(pid_of(env, "coordinator")).children(recursive=True)
    for process in coordinators:
        process.kill()
    psutil.wait_procs(coordinators)


def flow_run_of(env: PocEnv, job_id: str) -> FlowRun:
    async def find() -> FlowRun:
        async with get_client() as client:
            return await find_run(client, job_id)

    with temporary_settings(env.settings()):
        return asyncio.run(find())


def states_of_rounds(env: PocEnv, job_id: str) -> list[str | None]:
    """The states of the flow runs of a job's rounds, in round order."""

    async def find() -> list[FlowRun]:
        async with get_client() as client:
            job = await find_run(client, job_id)
            of_job = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[job.id]))
            found: list[FlowRun] = await client.read_flow_runs(flow_run_filter=of_job)
            return found

    with temporary_settings(env.settings()):
        return [run.state_name for run in sorted(asyncio.run(find()), key=lambda run: run.name)]


def test_hello_pt_gives_the_same_bytes_as_in_simulation(
    env: PocEnv, hello_pt: FedAvgRecipe, prefect_api: str, tmp_path: Path
) -> None:
    remote = hello_pt.execute(env=env)
    assert remote.get_result().metrics[-1]["accuracy"] > 0.5
    local = hello_pt.execute(env=SimEnv(num_clients=3, workspace=tmp_path, progress=False))
    assert len(models_of(local)) == 3
    assert models_of(remote) == models_of(local)


def test_every_algorithm_gives_the_same_bytes_as_in_simulation(env: PocEnv, prefect_api: str, tmp_path: Path) -> None:
    simulation = SimEnv(num_clients=3, workspace=tmp_path, progress=False)
    for name in algorithms.ALGORITHMS:
        recipe = algorithms.recipe_of(name)
        here, there = recipe.execute(simulation), recipe.execute(env)
        there.get_result(timeout=300)
        bytes_here = algorithms.models_of(Store(tmp_path), here.job_id)
        assert algorithms.models_of(env.open_store(), there.job_id) == bytes_here, name


def test_models_are_scored_across_sites_to_the_same_bytes_as_in_simulation(
    env: PocEnv, hello_pt: FedAvgRecipe, prefect_api: str, tmp_path: Path
) -> None:
    recipe = hello_pt.revise(cross_site_eval=True)
    remote = recipe.execute(env=env)
    local = recipe.execute(env=SimEnv(num_clients=3, workspace=tmp_path, progress=False))
    owners = {"server", "site-1", "site-2", "site-3"}
    matrix = remote.get_result().cross_site
    assert matrix is not None and all(set(row) >= owners for row in matrix.values())
    lasting = [
        [paths.cross_site, *(paths.global_model(round) for round in range(7))]
        for paths in (JobPaths(remote.job_id), JobPaths(local.job_id))
    ]
    for at_sites, simulated in zip(*lasting, strict=True):
        assert remote._store.read_bytes(at_sites) == local._store.read_bytes(simulated)
    assert verify_job(remote._store, remote.job_id).num_rounds == 7


def test_up_again_changes_nothing(env: PocEnv) -> None:
    before = env.status()
    assert {service.name for service in before} == {"server", "s3", "coordinator", *SITES}
    assert all(service.healthy for service in before)
    env.up()
    assert env.status() == before


def test_a_killed_site_shows_as_not_running_and_up_heals_it(env: PocEnv) -> None:
    killed = pid_of(env, "site-2")
    kill(killed)
    shown = {service.name: service for service in env.status()}
    assert shown["site-2"].pid is None and not shown["site-2"].healthy
    assert all(service.healthy for name, service in shown.items() if name != "site-2")
    env.up()
    healed = {service.name: service for service in env.status()}
    assert healed["site-2"].healthy and healed["site-2"].pid != killed
    assert all(healed[name] == shown[name] for name in shown if name != "site-2")


def test_settings_other_than_those_that_are_up_are_refused(env: PocEnv, home: Path) -> None:
    before = env.status()
    for other in ({"database": "sqlite+aiosqlite:////tmp/other.db"}, {"store": "/tmp/other"}):
        (name,) = other
        with pytest.raises(ConfigError, match=f"a proof of concept with {name}=.*is up in .*fedpool poc down"):
            PocEnv(num_clients=3, home=home, **other).up()
    assert env.status() == before


@pytest.mark.parametrize(
    "what",
    [("work-queue", "default", "--pool", "site-2"), ("work-pool", "site-2")],
    ids=["queue", "pool"],
)
def test_what_an_operator_has_paused_is_named_with_the_command_that_resumes_it(
    env: PocEnv, hello_pt: FedAvgRecipe, tmp_path: Path, what: tuple[str, ...]
) -> None:
    kind, *name = what
    paused = prefect(env, tmp_path, kind, "pause", *name)
    assert paused.returncode == 0, paused.stderr
    try:
        with pytest.raises(ConfigError, match=f"work pool 'site-2' is paused: prefect {kind} resume {' '.join(name)}"):
            hello_pt.execute(env)
    finally:
        resumed = prefect(env, tmp_path, kind, "resume", *name)
    assert resumed.returncode == 0, resumed.stderr


def test_the_logs_say_what_the_processes_print_and_hold_no_keys(env: PocEnv, home: Path) -> None:
    assert "Worker 'site-1' started" in env.log("site-1").read_text()
    with pytest.raises(ConfigError, match="no process 'site-9'; known processes: coordinator, s3, server, site-1"):
        env.log("site-9")
    state = json.loads((home / "poc.json").read_text())
    assert (home / "poc.json").stat().st_mode & 0o077 == 0
    secret = state["storage_options"]["secret"]
    assert all(secret not in service.log.read_text() for service in env.status())
    assert not any(secret in word for process in processes_of(home) for word in process.cmdline())


def test_a_site_whose_worker_is_killed_costs_the_job_no_more_than_the_site(env: PocEnv, tmp_path: Path) -> None:
    # Two jobs at once: one can do without the site, one cannot.
    first, second = (
        GatedJob(tmp_path / str(n), SITES, min_clients=n, name=f"needs-{n}", num_rounds=2, site_patience_s=5)
        for n in (2, 3)
    )
    with first.started(env) as needs_two, second.started(env) as needs_three:
        first.wait_until_held(needs_two)
        second.wait_until_held(needs_three)
        assert len(scripts_of(env.home / "sites" / "site-2")) >= 2
        kill(pid_of(env, "site-2"))
        wait_until_gone(scripts_of, env.home / "sites" / "site-2", 30)
        first.release()
        second.release()
        result = needs_two.get_result(240)
        assert [len(record["accepted"]) for record in result.rounds] == [3, 2]
        (failed,) = result.rounds[1]["failed"]
        assert (failed["site"], failed["attempt"]) == ("site-2", 0)
        assert "no worker of work pool site-2 is online" in failed["cause"]
        with pytest.raises(JobFailed, match=r"(?s)round 1.*site-2.*no worker of work pool site-2 is online"):
            needs_three.get_result(240)


def test_a_site_whose_worker_comes_back_says_that_it_lost_its_work(env: PocEnv, tmp_path: Path) -> None:
    job = GatedJob(tmp_path, SITES, min_clients=2, num_rounds=2)
    with job.started(env) as run:
        job.wait_until_held(run)
        kill(pid_of(env, "site-3"))
        env.up()
        job.release()
        result = run.get_result(240)
    (failed,) = result.rounds[1]["failed"]
    assert (
        failed["site"] == "site-3" and "the worker of site-3 was lost during its part of the round" in failed["cause"]
    )
    attempts = {entry["site"]: entry["attempt"] for entry in result.rounds[1]["accepted"]}
    assert attempts == {"site-1": 0, "site-2": 0, "site-3": 1}  # it was asked again and did its part


@pytest.mark.parametrize("by", ["recipe", "command"])
def test_a_job_whose_coordinator_is_killed_goes_on_with_what_has_arrived_meanwhile(
    by: str, env: PocEnv, tmp_path: Path
) -> None:
    job = GatedJob(tmp_path, SITES, num_rounds=3)
    with job.started(env) as run:
        job.wait_until_held(run)
        kill_coordinators(env)
        job.release()
        store, paths = env.open_store(), JobPaths(run.job_id)
        wait_until(lambda: all(store.exists(paths.manifest(1, site)) for site in SITES), timeout_s=400)
        with pytest.raises(JobFailed, match="was lost after 1 committed rounds: its run ended without a result"):
            run.get_result(120)
    if by == "command":  # in a process that knows neither the server nor the store's keys
        command = [sys.executable, "-m", "fedpool.cli", "job", "resume", run.job_id, "--home", str(env.home)]
        plain = {
            name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FEDPOOL_", "PREFECT_"))
        }
        resumed = subprocess.run(command, env=plain, cwd=tmp_path, capture_output=True, text=True)
        assert resumed.returncode == 0 and f"{run.job_id}: COMPLETED" in resumed.stdout, resumed.stdout + resumed.stderr
    result = job.recipe.execute(env, resume=run.job_id).get_result()  # returns the result of the completed job
    assert [record["failed"] for record in result.rounds] == [[], [], []]
    assert {entry["attempt"] for record in result.rounds for entry in record["accepted"]} == {
        0
    }  # no site was asked twice
    np.testing.assert_array_equal(result.params["w"], np.full(3, 3))
    assert verify_job(store, run.job_id).status == "COMPLETED"


def test_a_run_that_prefect_runs_again_goes_on_with_its_job(env: PocEnv, tmp_path: Path) -> None:
    job = GatedJob(tmp_path, SITES, name="rerun", num_rounds=2)
    name = job.recipe.deploy(env=env)

    async def started() -> FlowRun:
        async with get_client() as client:
            deployment = await client.read_deployment_by_name(name)
            run: FlowRun = await client.create_flow_run_from_deployment(deployment.id)
            return run

    async def state_of(run_id: UUID) -> State[Any] | None:
        async with get_client() as client:
            return (await client.read_flow_run(run_id)).state

    async def run_again(run_id: UUID) -> None:  # as the Retry button does
        async with get_client() as client:
            await client.set_flow_run_state(run_id, AwaitingRetry(), force=True)

    def is_in(run_id: UUID, kind: StateType) -> bool:
        state = asyncio.run(state_of(run_id))
        return state is not None and state.type == kind

    with temporary_settings(env.settings()):
        run = asyncio.run(started())
        wait_until(lambda: all((tmp_path / f"training-{site}").exists() for site in SITES))
        kill_coordinators(env)
        wait_until(lambda: is_in(run.id, StateType.CRASHED))
        asyncio.run(run_again(run.id))
        job.release()
        wait_until(lambda: is_in(run.id, StateType.COMPLETED))
    (found,) = [found for found in list_jobs(env.open_store()) if found.job_id.startswith("rerun")]
    assert (found.status, found.num_committed) == (JobStatus.COMPLETED, 2)
    assert verify_job(env.open_store(), found.job_id).num_updates == 6


def test_a_job_that_runs_is_not_resumed(env: PocEnv, tmp_path: Path) -> None:
    job = GatedJob(tmp_path, SITES, num_rounds=2)
    with job.started(env) as run:
        job.wait_until_held(run)
        with pytest.raises(ConfigError, match=f"job '{run.job_id}' has not ended: its run .* is Running"):
            job.recipe.execute(env, resume=run.job_id)
        job.release()
        run.get_result(120)


HANGS = """
    import threading
    import numpy as np
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        if flare.get_site_name() == "site-2":
            threading.Event().wait()
        flare.send(flare.FLModel(params={"w": model.params["w"] + (np.nan if flare.get_site_name() == "site-3" else 1)}))
"""


def test_a_hung_site_is_not_waited_for_and_a_rejection_is_an_event(env: PocEnv, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(textwrap.dedent(HANGS))
    recipe = FedAvgRecipe(
        name="hangs",
        min_clients=1,
        num_rounds=3,
        model={"w": np.zeros(2, np.float32)},
        train_script=tmp_path / "client.py",
        quorum_grace=2.0,
    )
    run = recipe.execute(env)
    result = run.get_result()
    for record in result.rounds:
        assert [[entry["site"] for entry in record[kind]] for kind in ("accepted", "late")] == [["site-1"], ["site-2"]]
        assert [entry["code"] for entry in record["rejected"]] in ([], ["not_finite"])
    wait_until_gone(scripts_of, env.home / "sites", 30)
    wanted = {
        "filter": {
            "event": {"name": ["fedpool.update.rejected"]},
            "related": {"id": [f"fedpool.job.{run.job_id}"]},
        }
    }

    def events() -> list[dict[str, Any]]:
        answer = httpx.post(f"{env.api_url}/events/filter", json=wanted, headers=env.access.headers)
        found: list[dict[str, Any]] = answer.json()["events"]
        return found

    wait_until(lambda: bool(events()), timeout_s=400)
    assert events()[0]["resource"]["prefect.resource.id"] == "fedpool.site.site-3"
    assert events()[0]["payload"]["code"] == "not_finite"


def test_a_job_survives_a_restart_of_the_api_server(env: PocEnv, tmp_path: Path) -> None:
    job = GatedJob(tmp_path, SITES)
    with job.started(env) as run:
        job.wait_until_held(run)
        kill(pid_of(env, "server"))
        env.up()
        job.release()
        result = run.get_result(300)
    assert result.num_rounds == 3 and float(result.params["w"][0]) == 3


@pytest.mark.parametrize("by", ["abort", "prefect flow-run cancel"])
def test_a_cancelled_job_is_gone_in_seconds_and_the_sites_take_the_next_one(
    by: str, env: PocEnv, tmp_path: Path
) -> None:
    workers = {service.name: service.pid for service in env.status()}
    job = GatedJob(tmp_path / "first", SITES)
    with job.started(env) as run:
        job.wait_until_held(run)
        if by == "abort":
            run.abort()
        else:
            done = prefect(env, tmp_path, "flow-run", "cancel", str(flow_run_of(env, run.job_id).id))
            assert done.returncode == 0, done.stdout
        began = time.monotonic()
        wait_until_gone(scripts_of, env.home, 30)
        assert run.wait(300)
        assert time.monotonic() - began < 30  # under 10 on an idle machine
        assert run.get_status() is JobStatus.CANCELLED
        with pytest.raises(JobCancelled, match="cancelled after 1 rounds"):
            run.get_result()
        state = flow_run_of(env, run.job_id).state
        assert state is not None and state.name == "Cancelled"
        first, *others = states_of_rounds(env, run.job_id)  # the round that was held, then those announced ahead
        assert first == "Completed" and others and set(others) == {"Crashed"}
    assert {service.name: service.pid for service in env.status()} == workers
    following = GatedJob(tmp_path / "second", SITES, hold=-1, num_rounds=1)
    assert following.recipe.execute(env=env).get_result().num_rounds == 1


@pytest.fixture(scope="module")
def adder(shared: PocEnv, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a deployment whose jobs each start from the previous job's model."""
    shared.up()
    job = GatedJob(tmp_path_factory.mktemp("deployed"), SITES, hold=-1, name="adder", num_rounds=1)
    return job.recipe.deploy(env=shared, warm_start=True)


def jobs_of_adder(env: PocEnv) -> list[str]:
    """The ids of the deployment's jobs, oldest first."""
    return [job.job_id for job in list_jobs(env.open_store()) if job.job_id.startswith("adder")][::-1]


def test_a_deployment_runs_by_the_stock_command_and_each_job_starts_from_the_last_ones_model(
    adder: str, env: PocEnv, tmp_path: Path
) -> None:
    assert adder == "federated-job/adder"
    alike = {"kind": "geometric_median", "weighted": False}
    for rounds, aggregator in ((2, "median"), (1, json.dumps(alike))):
        changes = ("-p", f"num_rounds={rounds}", "-p", f"aggregator={aggregator}")
        done = prefect(env, tmp_path, "deployment", "run", adder, *changes, "--watch")
        assert done.returncode == 0, done.stdout
    store = env.open_store()
    first, second = (JobPaths(job_id) for job_id in jobs_of_adder(env))
    assert [store.read_json(paths.job)["recipe"]["aggregator"] for paths in (first, second)] == ["median", alike]
    assert not store.exists(first.global_model(3)) and not store.exists(second.global_model(2))
    final = store.read_bytes(first.global_model(2))
    assert final != store.read_bytes(first.global_model(0))
    assert store.read_bytes(second.global_model(0)) == final


def test_a_deployment_refuses_parameters_out_of_bounds_with_the_reason(adder: str, env: PocEnv, tmp_path: Path) -> None:
    before = jobs_of_adder(env)
    done = prefect(env, tmp_path, "deployment", "run", adder, "-p", "num_rounds=0")
    assert done.returncode != 0
    assert "num_rounds" in done.stdout and "minimum" in done.stdout, done.stdout
    done = prefect(env, tmp_path, "deployment", "run", adder, "-p", 'aggregator={"kind": "krum"}')
    assert done.returncode != 0 and "aggregator" in done.stdout, done.stdout
    assert jobs_of_adder(env) == before


def test_a_deployment_runs_by_its_schedule(env: PocEnv, tmp_path: Path) -> None:
    job = GatedJob(tmp_path, SITES, hold=-1, name="hourly", num_rounds=1)
    env.deploy(job.recipe, schedule=timedelta(seconds=20))
    store = env.open_store()

    def completed() -> bool:
        return any(j.job_id.startswith("hourly") and j.status is JobStatus.COMPLETED for j in list_jobs(store))

    try:
        wait_until(completed, timeout_s=400)
    finally:
        done = prefect(env, tmp_path, "deployment", "delete", "federated-job/hourly")
    assert done.returncode == 0, done.stdout


def test_a_job_survives_a_store_that_is_cut_off_for_20_seconds(s3_server: S3Server, tmp_path: Path) -> None:
    env = PocEnv(clients=("a", "b"), store=f"{s3_server.url}/jobs", home=tmp_path / "poc", progress=False)
    try:
        env.up()
        job = GatedJob(tmp_path / "job", env.names, num_rounds=2)
        with job.started(env) as run:
            job.wait_until_held(run)
            s3_server.stop()
            job.release()  # the sites have updates but nowhere to write them
            assert not run.wait(20)
            s3_server.start()
            assert float(run.get_result(200).params["w"][0]) == 2
    finally:
        s3_server.start()
        env.down()
    wait_until_gone(processes_of, env.home)


def test_down_leaves_no_process_and_the_results_stay(tmp_path: Path) -> None:
    env = PocEnv(clients=("a",), home=tmp_path / "poc", progress=False)
    assert env.status() == []
    try:
        job = GatedJob(tmp_path / "job", env.names, hold=-1, num_rounds=1)
        run = job.recipe.execute(env=env)  # this brings it up
        assert len(processes_of(env.home)) >= 3
    finally:
        env.down()
    wait_until_gone(processes_of, env.home)
    assert env.status() == []
    assert float(run.get_result().params["w"][0]) == 1
    with pytest.raises(ConfigError, match="no proof of concept is up"):
        _ = env.api_url
    env.down()  # harmless


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_clients": 0}, "greater than or equal to 1"),
        ({"clients": ["../etc"]}, "cannot be part of a path"),
        ({"clients": ["a", "a"]}, "distinct names"),
        ({"clients": ["a", "A"]}, "differ only in case"),
        ({"clients": ["nul", "b"]}, "client 'nul' is the name of a device"),
        ({"clients": ["a"], "num_clients": 2}, "give only one of the two"),
        ({"s3": True, "store": "/tmp/store"}, "give only one of the two"),
        ({"num_client": 2}, r"num_client: did you mean num_clients\?"),
    ],
)
def test_a_wrong_environment_is_refused_when_it_is_built(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PocEnv(**fields)


def test_cancel_says_what_it_does_and_show_how_it_ended(
    env: PocEnv, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = GatedJob(tmp_path, SITES)
    with job.started(env) as run:
        job.wait_until_held(run)
        for arguments, words in (
            (("show", run.job_id), f"{run.job_id}: RUNNING"),
            (("cancel", run.job_id, "--wait"), f"{run.job_id}: asked to stop\n{run.job_id}: Cancelled"),
            (("show", run.job_id), f"{run.job_id}: CANCELLED"),
        ):
            with pytest.raises(SystemExit) as ended, temporary_settings(env.settings()):
                main(["job", *arguments, "--home", str(home)])
            shown = capsys.readouterr()
            assert ended.value.code in (0, None), shown.err
            assert words in shown.out
    assert f"store: s3://fedpool (of the proof of concept in {home})" in shown.out
