"""A site behind a process, Docker or Kubernetes pool: what the templates fix, and a real process
pool.
"""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import psutil
import pytest
from docker.models.containers import _create_container_args
from kubernetes_asyncio.client import ApiClient
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Scheduled
from prefect.workers.base import BaseJobConfiguration
from prefect.workers.process import ProcessJobConfiguration
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from fedpool import ConfigError, FedAvgRecipe
from fedpool.deployments.templates import base_job_template, parse_env
from fedpool.flows.site_round import site_round
from fedpool.flows.staging import stage
from fedpool.messages import SiteAssignment, UpdateManifest
from fedpool.paths import JobPaths
from fedpool.store import Store
from tests.conftest import ADD_ONE
from tests.poc import prefect, reaching, scripts_of, wait_until

SITE = "site-1"
BIN = Path(sys.executable).parent
FEDPOOL = BIN / "fedpool"

GIVEN: dict[str, dict[str, Any]] = {
    "process": {"data": "/srv/data", "config": "/srv/site.toml", "env": {"OMP_NUM_THREADS": "2"}},
    "docker": {
        "image": "registry.example/fedpool:1.0",
        "data": "/srv/data",
        "config": "/srv/site.toml",
        "env": {"OMP_NUM_THREADS": "2", "GREETING": "it's a {test}"},
        "memory": "4g",
        "cpus": 1.5,
    },
    "kubernetes": {
        "image": "registry.example/fedpool:1.0",
        "data": "scans",
        "config": "site-settings",
        "env": {"OMP_NUM_THREADS": "2"},
        "env_secret": "store-keys",
        "memory": "4Gi",
        "cpus": 1.5,
        "namespace": "federated",
    },
}
CONFIGURATIONS: dict[str, type[BaseJobConfiguration]] = {
    "process": ProcessJobConfiguration,
    "docker": DockerWorkerJobConfiguration,
    "kubernetes": KubernetesWorkerJobConfiguration,
}

HOSTILE: dict[str, Any] = {
    "command": "touch /tmp/canary",
    "image": "evil/image",
    "env": {"LD_PRELOAD": "/evil.so", "FEDPOOL_SITE_NAME": "other"},
    "env.PYTHONPATH": "/evil",
    "volumes": ["/:/host"],
    "privileged": True,
    "networks": ["host"],
    "network_mode": "host",
    "working_dir": "/",
    "container_create_kwargs": {"user": "root", "pid_mode": "host"},
    "container_create_kwargs.user": "root",
    "job_manifest": {"spec": {}},
    "namespace": "kube-system",
    "service_account_name": "admin",
    "cluster_config": {},
    "labels": {"a": "b"},
    "name": "evil",
}


def configured(kind: str, values: dict[str, Any], **given: Any) -> Any:
    """The job configuration that the pool's worker makes from the template and a deployment's job
    variables.
    """
    template = base_job_template(kind, name=SITE, **GIVEN[kind] | given)  # type: ignore[arg-type]
    return asyncio.run(CONFIGURATIONS[kind].from_template_and_values(json.loads(json.dumps(template)), values))


def prepared(kind: str, values: dict[str, Any]) -> Any:
    """That configuration at the time when the worker starts the job."""
    configuration = configured(kind, values)
    run = FlowRun(id=UUID(int=1), flow_id=UUID(int=2), name="curious-otter")
    with temporary_settings({PREFECT_API_URL: "http://server.example/api"}):
        configuration.prepare_for_flow_run(run)
    return configuration


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_job_variables_of_a_deployment_change_nothing(kind: str, prefect_api: str) -> None:
    assert prepared(kind, HOSTILE).model_dump() == prepared(kind, {}).model_dump()


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_the_server_refuses_job_variables(kind: str, prefect_api: str) -> None:
    async def deploy(**variables: Any) -> None:
        pool = f"pool-{uuid4()}"
        async with get_client() as client:
            template = base_job_template(kind, name=SITE, **GIVEN[kind])  # type: ignore[arg-type]
            await client.create_work_pool(WorkPoolCreate(name=pool, type=kind, base_job_template=template))
            flow_id = await client.create_flow(site_round)
            await client.create_deployment(flow_id=flow_id, name=pool, work_pool_name=pool, job_variables=variables)

    asyncio.run(deploy())
    with pytest.raises(PrefectHTTPStatusError, match="'env' was unexpected"):
        asyncio.run(deploy(env={"LD_PRELOAD": "/evil.so"}))


def test_a_container_gets_our_command_and_nothing_but_reading_rights(prefect_api: str) -> None:
    class Engine:
        def version(self) -> dict[str, str]:
            return {"Version": "28.0.0"}

    worker = DockerWorker(work_pool_name="any", test_mode=True)
    settings = worker._build_container_settings(Engine(), prepared("docker", HOSTILE))
    del settings["auto_remove"]  # docker-py handles this setting separately
    container = _create_container_args(settings | {"version": "1.47"})
    assert shlex.split(container["command"]) == [
        *("env", "OMP_NUM_THREADS=2", "GREETING=it's a {test}"),
        *("fedpool", "site", "run", "--name", SITE, "--sandbox", "none"),
        *("--data", "/data", "--config", "/etc/fedpool/site.toml", "--folder", "/tmp/fedpool-site"),
    ]
    assert container["image"] == "registry.example/fedpool:1.0"
    assert all(name.startswith("PREFECT_") for name in container["environment"])
    host = container["host_config"]
    assert host["Binds"] == ["/srv/data:/data:ro", "/srv/site.toml:/etc/fedpool/site.toml:ro"]
    assert not host.get("Privileged")
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"]) == (4 << 30, 4 << 30, 1_500_000_000)


def test_a_kubernetes_job_is_one_that_the_api_knows(prefect_api: str) -> None:
    manifest = prepared("kubernetes", HOSTILE).job_manifest
    pod = manifest["spec"]["template"]["spec"]

    for name in ("parallelism", "completions"):  # Prefect wants them in the pod, where the API does not know them
        del pod[name]

    class Response:
        data = json.dumps(manifest)

    async def read_back() -> Any:
        async with ApiClient() as api:
            return api.sanitize_for_serialization(api.deserialize(Response(), "V1Job"))

    assert asyncio.run(read_back()) == manifest  # a misnamed field would be missing

    assert manifest["metadata"]["namespace"] == "federated"
    (container,) = pod["containers"]
    assert container["image"] == "registry.example/fedpool:1.0"
    assert container["args"][:5] == ["fedpool", "site", "run", "--name", SITE]
    ours = [entry for entry in container["env"] if not entry["name"].startswith("PREFECT_")]
    assert ours == [{"name": "OMP_NUM_THREADS", "value": "2"}]
    assert container["envFrom"] == [{"secretRef": {"name": "store-keys"}}]
    assert [(mount["mountPath"], mount["readOnly"]) for mount in container["volumeMounts"]] == [
        ("/data", True),
        ("/etc/fedpool", True),
    ]
    assert container["resources"]["limits"] == {"memory": "4Gi", "cpu": "1500m"}
    assert not container["securityContext"]["privileged"]


def test_what_scripts_keep_has_a_place_that_outlives_the_container() -> None:
    docker = base_job_template("docker", name=SITE, store="s3://b", image="i", keep="/srv/kept")["job_configuration"]
    assert docker["volumes"] == ["/srv/kept:/tmp/fedpool-site/kept:rw"]
    assert docker["command"].endswith("--name site-1 --store s3://b --sandbox none --folder /tmp/fedpool-site")
    made = base_job_template("kubernetes", name=SITE, store="s3://b", image="i", keep="kept-a")
    pod = made["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["volumes"] == [{"name": "keep", "persistentVolumeClaim": {"claimName": "kept-a"}}]
    assert pod["containers"][0]["volumeMounts"] == [{"name": "keep", "mountPath": "/tmp/fedpool-site/kept"}]


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("podman", {}, "give process, docker or kubernetes"),
        ("docker", {"image": None}, "needs an image"),
        ("docker", {"config": None}, "a docker pool needs the store that the site uses: give store, such as s3://"),
        ("docker", {"config": None, "store": " "}, "store is ' ': it must not be empty"),
        ("process", {"image": "an-image"}, "a process pool has no option image"),
        ("docker", {"namespace": "here"}, "a docker pool has no option namespace"),
        ("docker", {"name": "../site"}, "site"),
        ("docker", {"data": "data"}, "not an absolute path"),
        ("docker", {"keep": "kept"}, "not an absolute path"),
        ("process", {"keep": "/srv/kept"}, "a process pool has no option keep"),
        ("kubernetes", {"keep": "/srv/kept"}, "is not a valid name for a persistent volume claim"),
        ("docker", {"data": "/a:/b"}, "without a colon"),
        ("process", {"config": "site.toml"}, "not an absolute path"),
        ("kubernetes", {"data": "/srv/data"}, "is not a valid name for a persistent volume claim"),
        ("kubernetes", {"config": "Site_1"}, "is not a valid name for a secret"),
        ("docker", {"memory": "4Gi"}, "write, for example, 512m, 4g"),
        ("kubernetes", {"memory": "4g"}, "write, for example, 512Mi, 4Gi"),
        ("docker", {"cpus": 0}, "give a number of processors"),
        ("docker", {"image": "{{ image }}"}, "would begin a placeholder"),
        ("docker", {"env": {"A": "{{ env }}"}}, "would begin a placeholder"),
        ("docker", {"env": {"A-B": "1"}}, "not a valid variable name"),
        ("docker", {"program": ""}, "must not be empty"),
        ("docker", {"program": "sh -c '"}, "cannot be split into words .No closing quotation.: balance its quotes"),
    ],
)
def test_what_does_not_fit_is_said(kind: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        base_job_template(kind, **{"name": SITE} | GIVEN.get(kind, {}) | given)  # type: ignore[arg-type]


def test_a_variable_is_written_as_name_and_value() -> None:
    assert parse_env(["A=1", "B=", "C=x=y"]) == {"A": "1", "B": "", "C": "x=y"}
    with pytest.raises(ConfigError, match="not of the form NAME=VALUE"):
        parse_env(["A"])


class ProcessPool:
    """A site behind a stock process worker, on a pool made from our template and registered with
    our command.
    """

    def __init__(self, api_url: str, folder: Path) -> None:
        self.folder = folder
        self.name = f"pool-{folder.name}"
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "FEDPOOL_"))}
        self.environment = ours | {
            "PATH": f"{BIN}:{ours['PATH']}",
            **reaching(api_url),
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
        }
        self.store = folder / "store"
        own = ("--name", SITE, "--store", str(self.store), "--data", str(folder))
        template = self.fedpool("site", "template", "--type", "process", *own)
        (folder / "template.json").write_text(template)
        options = ("--type", "process", "--base-job-template", str(folder / "template.json"))
        created = prefect(api_url, folder / "home", "work-pool", "create", *options, self.name)
        assert created.returncode == 0, created.stdout
        self.fedpool("site", "register", SITE, "--pool", self.name)
        with (folder / "worker.log").open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--pool", self.name],
                env=self.environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def fedpool(self, *arguments: str) -> str:
        return subprocess.run(
            [FEDPOOL, *arguments], env=self.environment, check=True, capture_output=True, text=True, timeout=400
        ).stdout

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(300)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def pool(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPool]:
    pool = ProcessPool(prefect_api, tmp_path_factory.mktemp("site"))
    try:
        yield pool
    finally:
        pool.close()


class StagedJob:
    """What a coordinator writes to the store: a job, and the site's assignment for round 0."""

    def __init__(self, folder: Path, script: str = ADD_ONE, *, store: Path | None = None) -> None:
        self.store = Store(store or folder / "store")
        (folder / "client.py").write_text(textwrap.dedent(script))
        recipe = FedAvgRecipe(
            name="cold",
            min_clients=1,
            num_rounds=1,
            model={"w": np.zeros(3, np.float32)},
            train_script=folder / "client.py",
        )
        self.job_id = f"cold-{uuid4()}"
        self.paths = JobPaths(self.job_id)
        digest = stage(recipe, self.job_id, self.store, (SITE,))
        assignment = SiteAssignment(
            site=SITE, round=0, task="train", base_sha256=digest.sha256, base_size=digest.size, timeout_s=None
        )
        self.store.write_json(self.paths.assignment(0, SITE), assignment.model_dump(mode="json"))
        self.parameters = {"job_id": self.job_id, "site": SITE, "round": 0, "attempt": 0, "store": self.store.url}

    def update(self) -> UpdateManifest | None:
        """The update that the site has committed, if any."""
        path = self.paths.manifest(0, SITE)
        return UpdateManifest.model_validate_json(self.store.read_bytes(path)) if self.store.exists(path) else None


async def ended(run_id: UUID) -> State[Any]:
    """Wait for a run to end; returns its final state."""
    async with get_client() as client:
        while True:
            state = (await client.read_flow_run(run_id)).state
            if state is not None and state.is_final():
                return state
            await asyncio.sleep(0.2)


async def run_deployment(name: str, parameters: dict[str, Any]) -> State[Any]:
    async with get_client() as client:
        deployment = await client.read_deployment_by_name(name)
        run = await client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
    return await asyncio.wait_for(ended(run.id), 400)


@pytest.mark.slow
def test_a_process_pool_does_a_round(pool: ProcessPool, tmp_path: Path) -> None:
    job = StagedJob(tmp_path, store=pool.store)
    state = asyncio.run(run_deployment(f"site-round/{SITE}", job.parameters))
    assert (state.name, state.message) == ("Completed", f"{SITE} finished its part of round 0")
    update = job.update()
    assert update is not None and update.size > 0


@pytest.mark.slow
def test_a_run_for_another_site_is_refused(pool: ProcessPool, tmp_path: Path) -> None:
    job = StagedJob(tmp_path, store=pool.store)
    state = asyncio.run(run_deployment(f"site-round/{SITE}", job.parameters | {"site": "site-2"}))
    assert state.is_failed()
    assert "this is site-1: the run was sent to the wrong work pool" in (state.message or "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["backup", "site-round"])
def test_nothing_of_a_hostile_deployment_is_executed(pool: ProcessPool, tmp_path: Path, name: str) -> None:
    """Whatever it calls its flow, the most that it achieves is an ordinary round."""
    job = StagedJob(tmp_path, store=pool.store)
    pulled, imported = tmp_path / "pulled", tmp_path / "imported"
    (tmp_path / "hostile.py").write_text(f"import pathlib\npathlib.Path({str(imported)!r}).touch()\n")

    @flow(name=name)
    def hostile() -> None: ...

    async def attack() -> State[Any]:
        async with get_client() as client:
            await client.create_deployment(
                flow_id=await client.create_flow(hostile),
                name="hostile",
                work_pool_name=pool.name,
                path=str(tmp_path),
                entrypoint="hostile.py:hostile",
                pull_steps=[{"prefect.deployments.steps.run_shell_script": {"script": f"touch {pulled}"}}],
            )
        return await run_deployment(f"{name}/hostile", job.parameters)

    state = asyncio.run(attack())
    if name == "site-round":
        assert state.is_completed() and job.update()
    else:
        assert state.is_crashed() and job.update() is None
        assert state.message == "this site runs only site-round: the run of 'backup' was refused"
    assert not pulled.exists() and not imported.exists()


@pytest.mark.slow
def test_job_variables_that_no_server_has_checked_change_nothing(pool: ProcessPool, tmp_path: Path) -> None:
    """Prefect checks the job variables of deployments, but not those of a run that has none."""
    job, canary = StagedJob(tmp_path, store=pool.store), tmp_path / "canary"

    async def attack() -> State[Any]:
        async with get_client() as client:
            run = await client.create_flow_run(
                site_round,
                parameters=job.parameters,
                state=Scheduled(),
                work_pool_name=pool.name,
                job_variables={"command": f"touch {canary}", "env": {"FEDPOOL_SITE_COMMAND": f"touch {canary}"}},
            )
        return await asyncio.wait_for(ended(run.id), 400)

    assert asyncio.run(attack()).is_completed() and job.update()
    assert not canary.exists()


def create_run(parameters: dict[str, Any]) -> UUID:
    """Create a run that no worker picks up."""

    async def create() -> UUID:
        async with get_client() as client:
            return (await client.create_flow_run(site_round, parameters=parameters)).id

    return asyncio.run(create())


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(prefect_api: str, tmp_path: Path) -> Iterator[Start]:
    """Starts `fedpool site run` like a container's command: nothing else stops it when the run is
    cancelled.
    """
    started = []

    def start(run_id: UUID, **variables: str) -> "subprocess.Popen[str]":
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "FEDPOOL_"))}
        server = {**reaching(prefect_api), "PREFECT_HOME": str(tmp_path / "home")}
        own = {"FEDPOOL_SITE_FOLDER": str(tmp_path / "site"), "FEDPOOL_SITE_STORE": str(tmp_path / "store")}
        site = {**own, **(variables or {"FEDPOOL_SITE_NAME": SITE})}
        process = subprocess.Popen(
            [FEDPOOL, "site", "run"],
            env=ours | server | site | {"PREFECT__FLOW_RUN_ID": str(run_id)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


HOLDS = """
    import pathlib, threading
    import fedpool.client as flare

    flare.init()
    flare.receive()
    pathlib.Path(FOLDER, "training").touch()
    threading.Event().wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["signal", "cancel"])
def test_a_round_can_be_stopped_and_leaves_no_process(start: Start, tmp_path: Path, how: str) -> None:
    job = StagedJob(tmp_path, HOLDS.replace("FOLDER", repr(str(tmp_path))))
    run_id = create_run(job.parameters)
    process = start(run_id)
    wait_until(lambda: (tmp_path / "training").exists(), over=lambda: process.poll() is not None)
    family = psutil.Process(process.pid).children(recursive=True)
    assert scripts_of(tmp_path)

    async def cancel() -> None:
        async with get_client() as client:
            await client.set_flow_run_state(run_id, State(type=StateType.CANCELLING))

    if how == "signal":
        process.send_signal(signal.SIGTERM)
    else:
        asyncio.run(cancel())
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    wait_until(lambda: not any(child.is_running() for child in family), timeout_s=400)
    state = asyncio.run(ended(run_id))
    assert state.name == ("Crashed" if how == "signal" else "Cancelled")
    assert job.update() is None
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["kept", "work"]  # they stay


@pytest.mark.slow
def test_the_settings_can_be_a_file_that_the_environment_names(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text('name = "site-7"\n')
    run_id = create_run(StagedJob(tmp_path).parameters)
    process = start(run_id, FEDPOOL_SITE_CONFIG_FILE=str(file))
    process.communicate(timeout=400)
    assert "this is site-7" in (asyncio.run(ended(run_id)).message or "")


@pytest.mark.slow
def test_of_settings_that_do_not_fit_the_server_learns_no_value(start: Start, tmp_path: Path) -> None:
    run_id = create_run(StagedJob(tmp_path).parameters)
    process = start(run_id, FEDPOOL_SITE_NAME=SITE, FEDPOOL_SITE_IDLE_TIMEOUT_S="secret")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "idle_timeout_s" in output and "secret" in output
    state = asyncio.run(ended(run_id))
    assert (state.name, state.message) == ("Crashed", "the site's settings are invalid: see its output")


def test_without_a_worker_there_is_nothing_to_run(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    ran = subprocess.run([FEDPOOL, "site", "run"], env=environment, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 1
    assert "to start a site's own worker, use `fedpool site start`" in ran.stderr
