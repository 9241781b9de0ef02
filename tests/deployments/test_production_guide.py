"""Follows the text of docs/production.md on fresh PostgreSQL and S3 servers, with two sites."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from importlib.metadata import metadata
from pathlib import Path

import httpx
import pytest

from fedpool.deployments.server import free_port
from tests import services
from tests.conftest import ADD_ONE
from tests.poc import wait_until

pytestmark = pytest.mark.slow

GUIDE = (Path(__file__).parents[2] / "docs" / "production.md").read_text()
LOGIN = "operator:a-password"


def blocks(section: str, language: str = "text") -> list[str]:
    """The code blocks of a section of the guide, in order."""
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", GUIDE, re.MULTILINE | re.DOTALL)
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, f"{section} has no such block any more"
    return found


class Machine:
    """Runs the guide's blocks, with the guide's placeholders filled in."""

    def __init__(self, folder: Path, values: Mapping[str, str], environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._values = values
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "FEDPOOL_", "AWS_", "PG"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        self._environment = {
            **kept,
            **environment,
            "PATH": path,
            "PREFECT_HOME": str(folder / "prefect"),
            "DO_NOT_TRACK": "1",
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def filled(self, block: str, **values: str) -> str:
        for placeholder, value in {**self._values, **values}.items():
            block = block.replace(placeholder, value)
        return block

    def run(self, block: str) -> str:
        """Run a block to completion."""
        command = ["bash", "-e", "-c", self.filled(block)]
        done = subprocess.run(
            command, cwd=self._folder, env=self._environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str, block: str, until: str | None = None, **values: str) -> None:
        """Start a block whose last command keeps running; wait until its output has some words."""
        log = self._folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-e", "-c", self.filled(block, **values)],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._started.append(process)
        if until is not None:
            wait_until(lambda: until in log.read_text(), over=lambda: process.poll() is not None, timeout_s=300)

    def close(self) -> None:
        for process in reversed(self._started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(300)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    for found, missing in (
        (services.find_postgres(), services.POSTGRES_MISSING),
        (services.find_rclone(), services.RCLONE_MISSING),
    ):
        if found is None:
            pytest.skip(missing)
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(contextlib.closing(services.PostgresServer()))
        s3 = stack.enter_context(contextlib.closing(services.S3Server()))
        database, port = postgres.environment, str(free_port())
        values = {
            "prefect:PASSWORD@localhost/": f"prefect:a-password@127.0.0.1:{database['PGPORT']}/",
            "'PASSWORD'": "'a-password'",
            "NAME:PASSWORD": LOGIN,
            "--port 4200": f"--port {port}",
            "https://fl.example.org": f"http://127.0.0.1:{port}",
            "https://s3.example.org": s3.endpoint,
            "AWS_ACCESS_KEY_ID=KEY": f"AWS_ACCESS_KEY_ID={s3.environment['AWS_ACCESS_KEY_ID']}",
            "AWS_SECRET_ACCESS_KEY=SECRET": f"AWS_SECRET_ACCESS_KEY={s3.environment['AWS_SECRET_ACCESS_KEY']}",
        }
        made = Machine(tmp_path, values, database)
        stack.callback(made.close)
        yield made


def test_the_guide_to_the_letter_gives_a_job_and_a_backup(machine: Machine, tmp_path: Path) -> None:
    (install,) = blocks("Install")
    extra = re.fullmatch(r'pip install --constraint constraints\.txt "\.\[(\w+)\]"\n', install)
    assert extra is not None and extra[1] in (metadata("fedpool").get_all("Provides-Extra") or ())

    database, server = blocks("The server")[:2]
    machine.run(database)
    machine.start("server", server)
    api = machine.filled("https://fl.example.org/api")
    name, password = LOGIN.split(":")

    def answers() -> bool:
        try:
            return httpx.get(f"{api}/health", auth=(name, password), trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(answers, timeout_s=300)
    machine.run(blocks("The store")[0])
    machine.start("coordinator", blocks("The coordinator")[0], "started!")
    settings = blocks("A site", "toml")[0]
    start = blocks("A site")[0]
    for site in ("hospital-a", "hospital-b"):
        folder = tmp_path / site
        folder.mkdir()
        file = folder / "site.toml"
        (folder / "images").mkdir()
        text = settings.replace("hospital-a", site).replace("/var/lib/fedpool", str(folder / "work"))
        text = text.replace("/srv/images", str(folder / "images"))
        file.write_text(re.sub(r"^gpus.*\n", "", text, flags=re.MULTILINE))  # this machine may have none
        machine.start(site, start, "started!", **{"/etc/fedpool/site.toml": str(file)})

    (tmp_path / "client.py").write_text(textwrap.dedent(ADD_ONE))
    recipe = """
import numpy as np
from fedpool import FedAvgRecipe

recipe = FedAvgRecipe(name="guide", min_clients=2, num_rounds=2, model={"w": np.zeros(3)}, train_script="client.py")
"""
    (block,) = re.findall(r"^```text\n(from fedpool import ProdEnv.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    now = machine.filled(block).replace("recipe.execute(env=env)", "run = recipe.execute(env=env)")
    (tmp_path / "job.py").write_text(f"{recipe}\n{now}\nprint(run.get_result().params['w'].tolist())\n")
    exports = "".join(line for line in start.splitlines(True) if line.startswith("export"))
    assert "[2.0, 2.0, 2.0]" in machine.run(f"{exports}\npython job.py")
    listed = machine.run(f"{exports}\nfedpool job list --store s3://fl-jobs")
    assert listed.startswith("store: s3://fl-jobs (--store)") and "COMPLETED" in listed
    assert "federated-job/guide" in machine.run(f"{exports}\nCOLUMNS=200 prefect deployment ls")

    dump, restore = blocks("Backup")
    machine.run(dump)
    machine.close()
    machine.run(f"dropdb --force prefect\n{restore}")
    assert int(machine.run('psql prefect -tA -c "select count(*) from flow_run"')) > 2
