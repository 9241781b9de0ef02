"""Shared fixtures: one real Prefect server for the whole run, and a way to run small jobs."""

import contextlib
import json
import os
import shutil
import signal
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import psutil
import pytest
from prefect.settings import temporary_settings

from fedpool import FedAvgRecipe, Recipe, Run, SimEnv
from fedpool.deployments.server import private_server
from fedpool.sites.sandbox import WITHOUT
from tests import services

ADD_ONE = """
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        flare.send(flare.FLModel(params={name: value + 1 for name, value in model.params.items()}))
"""


def pytest_configure(config: pytest.Config) -> None:
    """Make Ctrl-C work, and give each parallel test process its own temporary folder, for
    `leaves_nothing`.
    """
    # A shell makes its background commands ignore SIGINT, and child processes inherit that. A stock
    # Prefect worker that ignores SIGINT ignores SIGTERM too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Sites run scripts without a sandbox here, as most tests look at what a script has left in
    # other places. tests/sites/test_sandbox.py sets its own.
    os.environ["FEDPOOL_SITE_SANDBOX"] = json.dumps(WITHOUT)
    if hasattr(config, "workerinput"):
        tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp()
        Path(os.environ["TMPDIR"]).chmod(0o755)  # PostgreSQL does not run as root and must reach its files


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the temporary folder."""
    if hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """The API URL of a real Prefect server with an in-memory database. This process and its
    children know its password.
    """
    with private_server() as server, pytest.MonkeyPatch.context() as patch:
        server.wait()
        patch.setenv("PREFECT_API_AUTH_STRING", server.access.password)
        with temporary_settings(server.access.settings()):
            yield server.access.api_url


@pytest.fixture
def write_script(tmp_path: Path) -> Callable[..., Path]:
    """Writes a client script, dedented, and returns its path."""

    def write(text: str, name: str = "client.py") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def run_job(prefect_api: str, tmp_path: Path, write_script: Callable[..., Path]) -> Callable[..., Run]:
    """Runs a job to its end: `run_job(script text, env={...}, **recipe fields)`; two sites and two
    rounds by default.
    """

    def run(
        script: str = ADD_ONE,
        *,
        env: dict[str, Any] | None = None,
        wait: bool = True,
        kind: type[Recipe] = FedAvgRecipe,
        **fields: Any,
    ) -> Run:
        settings = {"num_clients": 2, "workspace": tmp_path / "runs", "progress": False} | (env or {})
        if "clients" in settings:
            del settings["num_clients"]
        defaults = {"name": "test", "min_clients": 2, "num_rounds": 2, "model": {"w": np.zeros(3, np.float32)}}
        recipe = kind(**defaults | {"train_script": write_script(script)} | fields)
        result: Run = recipe.execute(env=SimEnv(**settings), wait=wait)
        return result

    return run


@pytest.fixture
def leaves_nothing(prefect_api: str, tmp_path: Path) -> Iterator[None]:
    """Fails if the test leaves a child process or one of our temporary files behind."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    temporary = Path(os.environ.get("TMPDIR", "/tmp"))
    files_before = set(temporary.glob("fedpool-*"))
    yield
    left = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid not in before:
                left.append(" ".join(process.cmdline()))
    assert not left
    assert set(temporary.glob("fedpool-*")) == files_before
    assert not list(tmp_path.glob("runs/.fedpool*"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[services.PostgresServer]:
    """A real PostgreSQL: `postgres.url` is a database that tests can share,
    `postgres.new_database()` creates an empty one.
    """
    if services.find_postgres() is None:
        pytest.skip(services.POSTGRES_MISSING)
    with contextlib.closing(services.PostgresServer()) as server:
        yield server


@pytest.fixture(scope="module")
def s3_server() -> Iterator[services.S3Server]:
    """A real S3 server, one for each module; `s3_server.url` works in this process and its children
    without options.
    """
    if services.find_rclone() is None:
        pytest.skip(services.RCLONE_MISSING)
    file_systems = fsspec.get_filesystem_class("s3")
    with contextlib.closing(services.S3Server()) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        file_systems.clear_instance_cache()
        yield server
        file_systems.clear_instance_cache()
