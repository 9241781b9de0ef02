"""Production: a server with a password, a store on S3 and sites that others run; anything missing
is reported before anything runs.
"""

import asyncio
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import LogFilter
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from pydantic import ValidationError

from fedpool import ConfigError, FedAvgRecipe, FedpoolError, ProdEnv, ServerError, Store, StoreError
from fedpool.deployments.prefect_desk import register_site
from fedpool.deployments.server import free_port, server_command, server_environment, wait_until_up
from fedpool.flows.site_round import site_round
from fedpool.messages import SITE_PROTOCOL
from tests.conftest import ADD_ONE
from tests.poc import Worker, processes_of, wait_until_gone
from tests.services import S3Server

pytestmark = pytest.mark.slow

PASSWORD = "admin:a-password-of-the-operator"


@pytest.fixture(scope="module")
def api_url() -> Iterator[str]:
    """A Prefect server that requires a password, which is not in this process's settings."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="tests-prefect-") as home:
        log = Path(home) / "log"
        environment = server_environment(Path(home)) | {"PREFECT_SERVER_API_AUTH_STRING": PASSWORD}
        with (
            log.open("wb") as output,
            subprocess.Popen(
                server_command(port), env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output
            ) as server,
        ):
            try:
                wait_until_up(f"http://127.0.0.1:{port}/api", server, log)
                yield f"http://127.0.0.1:{port}/api"
            finally:
                server.kill()


@pytest.fixture
def as_operator(api_url: str) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: api_url, PREFECT_API_AUTH_STRING: PASSWORD}):
        yield


@pytest.fixture(scope="module")
def workers(api_url: str, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    """The workers of a coordinator and of the sites east and west."""
    folder = tmp_path_factory.mktemp("prod")
    commands: dict[str, tuple[str, ...]] = {"coordinator": ("fedpool.cli", "coordinator", "start", "--pool", "prod")}
    for site in ("east", "west"):
        own = ("--name", site, "--folder", str(folder / site), "--store", f"{s3_server.url}/prod")
        commands[site] = ("fedpool.cli", "site", "start", *own)
    started = {
        name: Worker(api_url, folder / name, *command, PREFECT_API_AUTH_STRING=PASSWORD)
        for name, command in commands.items()
    }
    try:
        for worker in started.values():
            worker.wait_until_started()
        yield started
    finally:
        for worker in started.values():
            worker.end()
    wait_until_gone(processes_of, folder)


@pytest.fixture
def recipe(write_script: Callable[..., Path]) -> FedAvgRecipe:
    model = {"w": np.zeros(3, np.float32)}
    return FedAvgRecipe(name="prod", min_clients=2, num_rounds=2, model=model, train_script=write_script(ADD_ONE))


@pytest.fixture
def env(api_url: str, tmp_path: Path) -> Callable[..., ProdEnv]:
    """Makes environments, with a folder as the store by default."""

    def make(**fields: Any) -> ProdEnv:
        defaults = {"api_url": api_url, "auth_string": PASSWORD, "store": str(tmp_path / "store")}
        known = {"sites": ("east", "west"), "coordinator_pool": "prod", "progress": False}
        return ProdEnv(**defaults | known | fields)

    return make


def refused(env: ProdEnv, recipe: FedAvgRecipe, error: type[FedpoolError]) -> str:
    """The message with which `execute` refuses a recipe; checks that nothing was submitted."""
    with pytest.raises(error) as caught:
        recipe.execute(env=env)
    store = Path(env.store)
    assert not store.is_dir() or list(store.iterdir()) == []
    return str(caught.value)


def test_a_job_runs_at_real_sites_and_no_credential_is_in_its_records(
    workers: dict[str, Worker],
    env: Callable[..., ProdEnv],
    recipe: FedAvgRecipe,
    s3_server: S3Server,
    as_operator: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # models of a remote store are downloaded to this folder
    run = recipe.execute(env=env(store=f"{s3_server.url}/prod"))
    result = run.get_result()
    assert result.params["w"].tolist() == [2, 2, 2]

    async def read() -> str:
        async with get_client() as client:
            runs = await client.read_flow_runs(limit=200)
            deployments = await client.read_deployments()
            logs = await client.read_logs(LogFilter(), limit=200)
            assert len(runs) > 4 and len(logs) > 4
            return "".join(entry.model_dump_json() for entry in (*runs, *deployments, *logs))

    kept = asyncio.run(read())
    store = Store(f"{s3_server.url}/prod/{run.job_id}")
    kept += store.read_bytes("job.json").decode() + store.read_bytes("result.json").decode()
    kept += "".join(worker.log for worker in workers.values())
    for secret in (
        PASSWORD,
        s3_server.environment["AWS_SECRET_ACCESS_KEY"],
        s3_server.environment["AWS_ACCESS_KEY_ID"],
    ):
        assert secret not in kept


def test_a_store_that_cannot_be_written_to_is_named(
    workers: dict[str, Worker], env: Callable[..., ProdEnv], recipe: FedAvgRecipe, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    message = refused(env(store=str(tmp_path / "file" / "store")), recipe, StoreError)
    assert message.startswith(f"{tmp_path}/file/store/ cannot be written: NotADirectoryError: ")
    assert f"check the address of the store, file://{tmp_path}/file/store, and that its credentials" in message


def test_everything_that_is_missing_is_said_at_once(
    workers: dict[str, Worker], env: Callable[..., ProdEnv], recipe: FedAvgRecipe, as_operator: None
) -> None:
    async def prepare() -> None:
        async with get_client() as client:
            for pool, kind in (("idle", "fedpool-coordinator"), ("asleep", "fedpool-site")):
                await client.create_work_pool(WorkPoolCreate(name=pool, type=kind))
            await register_site(client, "asleep", "asleep")
            await client.create_deployment(
                flow_id=await client.create_flow(site_round), name="old", version="0", work_pool_name="east"
            )

    asyncio.run(prepare())
    sites = ("east", "asleep", "old", "unknown")
    assert refused(env(sites=sites, coordinator_pool="idle"), recipe, ConfigError).splitlines() == [
        "no worker of work pool 'idle' is online: fedpool coordinator start --pool idle",
        "no worker of work pool 'asleep' is online: fedpool site start --name asleep --store URL",
        f"site 'old' speaks protocol 0, but this version of fedpool speaks {SITE_PROTOCOL}: upgrade it",
        "site 'unknown' is not registered: fedpool site start --name unknown --store URL",
    ]
    assert refused(env(coordinator_pool="nowhere"), recipe, ConfigError) == (
        "there is no work pool 'nowhere': fedpool coordinator start --pool nowhere"
    )
    with pytest.raises(ConfigError, match="there is no work pool 'nowhere'"):
        recipe.deploy(env=env(coordinator_pool="nowhere"))


def test_a_server_that_does_not_answer_is_named(env: Callable[..., ProdEnv], recipe: FedAvgRecipe) -> None:
    message = refused(env(api_url=f"http://127.0.0.1:{free_port()}/api"), recipe, ServerError)
    assert "the Prefect server at http://127.0.0.1:" in message and "does not answer" in message


def test_a_wrong_password_is_refused_and_not_repeated(env: Callable[..., ProdEnv], recipe: FedAvgRecipe) -> None:
    message = refused(env(auth_string="admin:wrong-one"), recipe, ServerError)
    assert "refused" in message and "401" in message and "wrong-one" not in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sites": ()}, "at least 1 item"),
        ({"sites": ("a", "a")}, "has the same name twice"),
        ({"sites": ("a/b",)}, "cannot be part of a path"),
        ({"sites": ("a", "A")}, "differ only in case"),
        ({"sites": ("con.x",)}, "is the name of a device"),
        ({"api_url": "example.org"}, "is not a URL: write it as https://host/api"),
    ],
)
def test_a_wrong_environment_is_refused_when_it_is_built(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        ProdEnv(**{"store": str(tmp_path), "sites": ("a",)} | fields)


def test_its_text_shows_no_credential(env: Callable[..., ProdEnv]) -> None:
    shown = repr(env(storage_options={"secret": "a-key"}))
    assert PASSWORD not in shown and "a-key" not in shown
