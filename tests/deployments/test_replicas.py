"""Several API servers on one database, with docs/production.md's settings, on real PostgreSQL and
Redis.
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from fedpool import JobStatus, ProdEnv
from fedpool.deployments.access import Access
from fedpool.deployments.server import free_port, server_environment, wait_until_up
from fedpool.deployments.stored_jobs import list_jobs
from tests import services
from tests.poc import GatedJob, Worker, processes_of, wait_until, wait_until_gone
from tests.servers import prefect_program

pytestmark = pytest.mark.slow

SITES = ("east", "west")
PASSWORD = "admin:a-password-of-the-operator"


@pytest.fixture
def replicas(postgres: services.PostgresServer, tmp_path: Path) -> Iterator[list[Access]]:
    """Access to two servers whose background services run in a separate process; all share
    PostgreSQL and Redis.
    """
    if services.find_redis() is None:
        pytest.skip(services.REDIS_MISSING)
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(contextlib.closing(services.RedisServer()))
        both = [Access(f"http://127.0.0.1:{free_port()}", PASSWORD) for _ in range(2)]
        environment = server_environment(tmp_path / "prefect", both[0], postgres.new_database()) | {
            "PREFECT_MESSAGING_BROKER": "prefect_redis.messaging",
            "PREFECT_MESSAGING_CACHE": "prefect_redis.messaging",
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
            "PREFECT_REDIS_MESSAGING_URL": redis.url,
            "PREFECT_SERVER_DOCKET_URL": redis.url,
            "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
        }
        upgrade = ("server", "database", "upgrade", "-y")
        with prefect_program(tmp_path / "upgrade", environment, *upgrade) as process:
            assert process.wait(300) == 0, (tmp_path / "upgrade/log").read_text()
        for name, access in zip("ab", both, strict=True):
            command = ("server", "start", "--no-services", "--host", "127.0.0.1", "--port", str(access.port))
            process = stack.enter_context(prefect_program(tmp_path / name, environment, *command))
            wait_until_up(access.api_url, process, tmp_path / name / "log")
        stack.enter_context(prefect_program(tmp_path / "services", environment, "server", "services", "start"))
        yield both


def test_a_job_and_a_schedule_run_across_two_api_servers(replicas: list[Access], tmp_path: Path) -> None:
    first, second = replicas
    coordinator = ("fedpool.cli", "coordinator", "start")
    with contextlib.ExitStack() as stack:
        workers = [Worker(first.api_url, tmp_path / "coordinator", *coordinator, **first.environment)]
        for site, access in zip(SITES, replicas, strict=True):
            own = ("--name", site, "--folder", str(tmp_path / site / "scripts"), "--store", str(tmp_path / "store"))
            command = ("fedpool.cli", "site", "start", *own)
            workers.append(Worker(access.api_url, tmp_path / site, *command, **access.environment))
        for worker in workers:
            stack.callback(worker.end)
        for worker in workers:
            worker.wait_until_started()
        env = ProdEnv(
            api_url=second.api_url,
            auth_string=second.password,
            store=str(tmp_path / "store"),
            sites=SITES,
            progress=False,
        )

        job = GatedJob(tmp_path / "job", SITES, hold=-1)
        result = job.recipe.execute(env=env).get_result()
        assert result.params["w"].tolist() == [3, 3, 3]
        for access in replicas:  # both report the same
            wanted = {"flow_runs": {"name": {"like_": "round 2"}}}
            found = httpx.post(f"{access.api_url}/flow_runs/filter", json=wanted, headers=access.headers).json()
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
