"""What the server knows about a site's worker: that it is online, that it has left, and that it is
the only one.
"""

import asyncio
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import VariableUpdate
from prefect.client.schemas.objects import Worker as WorkerRecord

from fedpool.deployments.server import free_port, server_command, server_environment
from fedpool.deployments.site_claim import Holder, variable_name
from tests.poc import Worker, processes_of, wait_until

pytestmark = pytest.mark.slow

SERVED = "is already served by"


@pytest.fixture
def start(prefect_api: str, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts a site's worker in its own folder, and ends it after the test."""
    workers: list[Worker] = []

    def start_one(site: str, api: str = prefect_api, **variables: str) -> Worker:
        folder = tmp_path / f"worker-{len(workers)}"
        own = ("--name", site, "--folder", str(folder), "--store", str(folder / "store"))
        worker = Worker(api, folder, "fedpool.cli", "site", "start", *own, **variables)
        workers.append(worker)
        return worker

    yield start_one
    for worker in workers:
        worker.end()


def workers_of(pool: str) -> list[WorkerRecord]:
    async def read() -> list[WorkerRecord]:
        async with get_client() as client:
            found: list[WorkerRecord] = await client.read_workers_for_work_pool(pool)
            return found

    return asyncio.run(read())


def claim_to(site: str) -> Holder | None:
    async def read() -> Any:
        async with get_client() as client:
            return await client.read_variable_by_name(variable_name(site))

    found = asyncio.run(read())
    return None if found is None else Holder(**found.value)


def seem_elsewhere(site: str) -> None:
    """Make a site's claim name another machine, whose processes cannot be checked from here."""
    holder = claim_to(site)
    assert holder is not None

    async def change() -> None:
        async with get_client() as client:
            value = asdict(replace(holder, machine="another", host="another"))
            await client.update_variable(VariableUpdate(name=variable_name(site), value=value))

    asyncio.run(change())


def test_a_worker_that_is_stopped_leaves_no_record_and_no_claim(start: Callable[..., Worker]) -> None:
    worker = start("leaving").wait_until_started()
    assert [record.name for record in workers_of("leaving")] == ["leaving"]
    holder = claim_to("leaving")
    assert holder is not None and (holder.pid, holder.host) == (worker.process.pid, socket.gethostname())
    worker.process.terminate()
    assert worker.process.wait(300) == 0
    assert workers_of("leaving") == [] and claim_to("leaving") is None


def test_a_second_worker_of_a_site_is_refused_and_the_first_goes_on(start: Callable[..., Worker]) -> None:
    first = start("taken").wait_until_started()
    second = start("taken")
    assert second.process.wait(300) == 1
    assert f"site 'taken' {SERVED} process {first.process.pid} on {socket.gethostname()}" in second.log
    assert "stop that process first" in second.log and "Traceback" not in second.log
    assert not list(second.folder.glob(".fedpool-*"))
    assert first.process.poll() is None and len(workers_of("taken")) == 1
    assert claim_to("taken") is not None


def test_of_two_workers_that_start_at_once_one_is_refused(start: Callable[..., Worker]) -> None:
    both = [start("raced"), start("raced")]
    wait_until(lambda: any(worker.process.poll() is not None for worker in both))
    (winner,) = (worker for worker in both if worker.process.poll() is None)
    (loser,) = (worker for worker in both if worker is not winner)
    winner.wait_until_started()
    assert loser.process.returncode == 1
    assert f"{SERVED} process {winner.process.pid} on" in loser.log


def test_a_worker_that_was_killed_is_replaced_at_once(start: Callable[..., Worker]) -> None:
    first = start("killed").wait_until_started()
    first.process.kill()
    first.process.wait()
    second = start("killed").wait_until_started()  # although the server still counts the first one as online
    holder = claim_to("killed")
    assert holder is not None and holder.pid == second.process.pid


def test_on_another_machine_a_worker_lives_by_its_heartbeats(start: Callable[..., Worker]) -> None:
    first = start("moved").wait_until_started()
    seem_elsewhere("moved")
    second = start("moved")
    assert second.process.wait(300) == 1
    assert f"process {first.process.pid} on another has a claim on this site: waiting up to" in second.log
    assert f"{SERVED} process {first.process.pid} on another" in second.log
    first.process.send_signal(signal.SIGSTOP)
    try:
        third = start("moved").wait_until_started()  # after three missed heartbeats
    finally:
        first.process.send_signal(signal.SIGCONT)
    # The first worker, which was suspended meanwhile, finds out by itself.
    assert first.process.wait(300) == 1
    assert f"{SERVED} process {third.process.pid} on" in first.log
    assert third.process.poll() is None and len(workers_of("moved")) == 1


def test_a_server_answers_again_only_once_it_has_answered(start: Callable[..., Worker], tmp_path: Path) -> None:
    port = free_port()
    worker = start("early", api=f"http://127.0.0.1:{port}/api", PREFECT_LOGGING_LEVEL="DEBUG")
    wait_until(lambda: "the Prefect server is unreachable" in worker.log)
    wait_until(lambda: worker.log.count("the Prefect server is unreachable") >= 3)  # warned once, logged each time
    assert "answers again" not in worker.log
    environment = server_environment(tmp_path / "server")
    with (tmp_path / "server.log").open("wb") as output:
        command = server_command(port)
        server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output)
    try:
        wait_until(lambda: "the Prefect server answers again" in worker.log)
    finally:
        worker.end()
        server.kill()
        server.wait()
        assert server.stdin is not None
        server.stdin.close()
    assert not processes_of(worker.folder)


def test_the_names_of_variables_tell_all_sites_apart() -> None:
    names = ["a", "A", "a.b", "a-b", "a_b", "Hospital-1", "hospital-1"]
    found = {variable_name(name) for name in names}
    assert len(found) == len(names)
    assert variable_name("hospital-1") == "fedpool-site-hospital-1"
