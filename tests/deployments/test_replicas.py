"""Several API servers on one database, with docs/production.md's settings, on real PostgreSQL and
Redis.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from fedpool import JobStatus, ProdEnv
from fedpool.deployments.server import free_port, server_environment, wait_until_up
from fedpool.deployments.stored_jobs import list_jobs
from tests import services
from tests.poc import GatedJob, Worker, processes_of, wait_until, wait_until_gone

pytestmark = pytest.mark.slow

SITES = ("east", "west")


@contextlib.contextmanager
def started(folder: Path, environment: dict[str, str], *command: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run the stock `prefect` command in a process whose output goes to FOLDER/log."""
    folder.mkdir()
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *command], env=environment, cwd=folder, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(300)


@pytest.fixture
def replicas(postgres: services.PostgresServer, tmp_path: Path) -> Iterator[list[str]]:
    """The API URLs of two servers whose background services run in a separate process; all share
    PostgreSQL and Redis.
    """
    if services.find_redis() is None:
        pytest.skip(services.REDIS_MISSING)
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(contextlib.closing(services.RedisServer()))
        environment = server_environment(tmp_path / "prefect", postgres.new_database()) | {
            "PREFECT_MESSAGING_BROKER": "prefect_redis.messaging",
            "PREFECT_MESSAGING_CACHE": "prefect_redis.messaging",
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
            "PREFECT_REDIS_MESSAGING_URL": redis.url,
            "PREFECT_SERVER_DOCKET_URL": redis.url,
            "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
        }
        upgrade = ("server", "database", "upgrade", "-y")
        with started(tmp_path / "upgrade", environment, *upgrade) as process:
            assert process.wait(300) == 0, (tmp_path / "upgrade/log").read_text()
        urls = []
        for name in ("a", "b"):
            port = free_port()
            command = ("server", "start", "--no-services", "--host", "127.0.0.1", "--port", str(port))
            process = stack.enter_context(started(tmp_path / name, environment, *command))
            urls.append(f"http://127.0.0.1:{port}/api")
            wait_until_up(urls[-1], process, tmp_path / name / "log")
        stack.enter_context(started(tmp_path / "services", environment, "server", "services", "start"))
        yield urls


def test_a_job_and_a_schedule_run_across_two_api_servers(replicas: list[str], tmp_path: Path) -> None:
    first, second = replicas
    coordinator = ("fedpool.cli", "coordinator", "start")
    with contextlib.ExitStack() as stack:
        workers = [Worker(first, tmp_path / "coordinator", *coordinator)]
        for site, url in zip(SITES, replicas, strict=True):
            own = ("--name", site, "--folder", str(tmp_path / site / "scripts"), "--store", str(tmp_path / "store"))
            workers.append(Worker(url, tmp_path / site, "fedpool.cli", "site", "start", *own))
        for worker in workers:
            stack.callback(worker.end)
        for worker in workers:
            worker.wait_until_started()
        env = ProdEnv(api_url=second, store=str(tmp_path / "store"), sites=SITES, progress=False)

        job = GatedJob(tmp_path / "job", SITES, hold=-1)
        result = job.recipe.execute(env=env).get_result()
        assert result.params["w"].tolist() == [3, 3, 3]
        for url in replicas:  # both report the same
            found = httpx.post(f"{url}/flow_runs/filter", json={"flow_runs": {"name": {"like_": "round 2"}}}).json()
            sites = sorted(run["name"].split()[-1] for run in found if run["deployment_id"])
            assert sites == list(SITES)
            assert {run["state_name"] for run in found} == {"Completed"}

        hourly = GatedJob(tmp_path / "hourly", SITES, hold=-1, name="hourly", num_rounds=1)
        env.deploy(hourly.recipe, schedule=timedelta(seconds=20))
        store = env.open_store()
        wait_until(
            lambda: any(j.job_id.startswith("hourly") and j.status is JobStatus.COMPLETED for j in list_jobs(store)),
            timeout_s=400,
        )
    wait_until_gone(processes_of, tmp_path / "coordinator")
