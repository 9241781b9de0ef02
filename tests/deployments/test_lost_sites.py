"""Sites that go offline while a job runs, for a while or for good: what that costs, and what the
job's record says about it.
"""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, LogFilter
from prefect.settings import temporary_settings

from fedpool import ConfigError, JobFailed, JobStatus, PocEnv, Run
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.tasks.report.tables import round_table
from tests.conftest import ADD_ONE
from tests.poc import GatedJob, processes_of, wait_until, wait_until_gone
from tests.services import FAKETIME_MISSING, clock_off_by, find_faketime

pytestmark = pytest.mark.slow

SITES = ("a", "b", "c")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PocEnv]:
    home = tmp_path_factory.mktemp("poc")
    # Rounds are announced one at a time, so that a site doesn't already have the next one when
    # something happens to it.
    env = PocEnv(clients=SITES, home=home, look_ahead=0, progress=False)
    try:
        env.up()
        yield env
    finally:
        env.down()
        wait_until_gone(processes_of, home)


@pytest.fixture
def env(shared: PocEnv) -> PocEnv:
    shared.up()
    return shared


def worker_of(env: PocEnv, site: str) -> psutil.Process:
    pid = next(service.pid for service in env.status() if service.name == site)
    assert pid is not None
    return psutil.Process(pid)


def set_paused(env: PocEnv, pool: str, *, paused: bool) -> None:
    """Pause or resume a work pool, as an operator does."""

    async def update() -> None:
        async with get_client() as client:
            await client.update_work_pool(pool, WorkPoolUpdate(is_paused=paused))

    with temporary_settings(env.settings()):
        asyncio.run(update())


def committed(env: PocEnv, run: Run, round: int) -> bool:
    return env.open_store().exists(JobPaths(run.job_id).record(round))


def not_asked(record: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = record.get("not_asked", [])
    return found


def all_logs(env: PocEnv) -> str:
    """What all runs have logged, including the runs of the rounds."""

    async def read() -> str:
        lines: list[str] = []
        async with get_client() as client:
            while page := await client.read_logs(LogFilter(), limit=200, offset=len(lines)):
                lines += [log.message for log in page]
        return "\n".join(lines)

    with temporary_settings(env.settings()):
        return asyncio.run(read())


def test_a_site_that_is_gone_costs_one_round_of_ten_and_is_asked_again_once_it_is_back(
    env: PocEnv, tmp_path: Path
) -> None:
    job = GatedJob(tmp_path, SITES, hold=(1, 7), min_clients=2, num_rounds=10, site_patience_s=5)
    with job.started(env) as run:
        job.wait_until_held(run, round=1)
        worker = worker_of(env, "c")
        worker.kill()
        worker.wait()
        job.release(1)
        job.wait_until_held(run, round=7, sites=("a", "b"))
        env.up()
        job.release(7)
        result = run.get_result(240)
    first = result.rounds[1]
    (lost,) = first["failed"]
    assert lost["site"] == "c" and lost["away"] is True
    assert lost["cause"].startswith("no worker of work pool c is online, and that did not change within 5 s")
    left = [record["round"] for record in result.rounds if not_asked(record)]
    assert left == [2, 3, 4, 5, 6, 7]
    assert all(not_asked(result.rounds[number]) == [{"site": "c", "reason": "no worker online"}] for number in left)
    for number in range(2, 7):
        assert result.rounds[number]["timings"]["round_s"] < first["timings"]["round_s"] / 2
    row = next(row for row in round_table(result.records[2]) if row["site"] == "c")
    assert row["state"] == "not asked: no worker online"
    assert [len(record["accepted"]) for record in result.rounds[8:]] == [3, 3]  # it is back
    assert verify_job(env.open_store(), run.job_id).status == "COMPLETED"


def test_the_default_recipe_outlasts_a_worker_that_stands_still_for_a_minute(env: PocEnv, tmp_path: Path) -> None:
    job = GatedJob(tmp_path, SITES, num_rounds=3)
    with job.started(env) as run:
        job.wait_until_held(run)
        worker = worker_of(env, "b")
        worker.send_signal(signal.SIGSTOP)
        try:
            job.release()
            assert not run.wait(65)  # a minute is what is tested
        finally:
            worker.send_signal(signal.SIGCONT)
        result = run.get_result(240)
    assert [len(record["accepted"]) for record in result.rounds] == [3, 3, 3]
    assert [record["failed"] for record in result.rounds] == [[], [], []]
    told = "b: no worker of work pool b is online: waiting for up to 120 s (site_patience_s)"
    wait_until(lambda: told in all_logs(env))  # logs are sent in batches


def test_too_few_sites_fail_the_job_after_its_patience_with_names_and_how_to_go_on(env: PocEnv, tmp_path: Path) -> None:
    job = GatedJob(tmp_path, SITES, num_rounds=2, site_patience_s=3)
    with job.started(env) as run:
        job.wait_until_held(run)
        worker = worker_of(env, "a")
        worker.kill()
        worker.wait()
        job.release()
        with pytest.raises(JobFailed) as failed:
            run.get_result(240)
    message = str(failed.value)
    assert "round 1: 2 of 3 sites" in message and "a failed: no worker of work pool a is online" in message
    assert f"once a can be reached again: fedpool job resume {run.job_id}" in message
    env.up()
    result = job.recipe.execute(env, resume=run.job_id).get_result()
    assert [len(record["accepted"]) for record in result.rounds] == [3, 3]


def test_a_paused_pool_is_named_by_the_submission_and_is_a_site_away_to_a_run_in_hand(
    env: PocEnv, tmp_path: Path
) -> None:
    job = GatedJob(tmp_path, SITES, min_clients=2, num_rounds=6, hold=3, site_patience_s=5)
    set_paused(env, "c", paused=True)
    try:
        with pytest.raises(ConfigError, match="work pool 'c' is paused: prefect work-pool resume c"):
            job.recipe.execute(env)
    finally:
        set_paused(env, "c", paused=False)
    with job.started(env) as run:
        job.wait_until_held(run)
        set_paused(env, "c", paused=True)
        try:
            job.release()
            wait_until(lambda: committed(env, run, 5), over=lambda: run.get_status() is JobStatus.FAILED)
        finally:
            set_paused(env, "c", paused=False)
        result = run.get_result(240)
    assert len(result.rounds[3]["accepted"]) == 3  # it had begun
    (away,) = result.rounds[4]["failed"]
    assert away["cause"].startswith("work pool c is paused")
    assert not_asked(result.rounds[5]) == [{"site": "c", "reason": "its work pool is paused"}]
    told = "c: work pool c is paused: waiting for up to 5 s (site_patience_s)"
    wait_until(lambda: told in all_logs(env))


def test_a_site_that_is_no_longer_registered_is_named_and_taken_again_once_it_is(env: PocEnv, tmp_path: Path) -> None:
    async def delete() -> None:
        async with get_client() as client:
            await client.delete_deployment((await client.read_deployment_by_name("site-round/c")).id)

    job = GatedJob(tmp_path, SITES, hold=(1, 3), min_clients=2, num_rounds=5)
    with job.started(env) as run:
        job.wait_until_held(run, round=1)
        with temporary_settings(env.settings()):
            asyncio.run(delete())
        job.release(1)
        job.wait_until_held(run, round=3, sites=("a", "b"))
        worker = worker_of(env, "c")
        worker.terminate()
        worker.wait()
        env.up()
        job.release(3)
        result = run.get_result(240)
    for record in result.rounds[2:4]:
        (failed,) = record["failed"]
        assert failed["cause"] == "it has no deployment site-round/c: start its worker, or register it"
    assert len(result.rounds[4]["accepted"]) == 3


def test_a_site_whose_run_is_deleted_is_asked_again(env: PocEnv, tmp_path: Path) -> None:
    async def delete(name: str) -> bool:
        async with get_client() as client:
            found = await client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
            for flow_run in found:
                await client.delete_flow_run(flow_run.id)
        return bool(found)

    job = GatedJob(tmp_path, SITES, hold=1, num_rounds=3)
    with job.started(env) as run:
        job.wait_until_held(run, round=1)
        set_paused(env, "c", paused=True)
        try:
            job.release(1)
            with temporary_settings(env.settings()):
                wait_until(lambda: asyncio.run(delete(f"{run.job_id} round 2 c")))
        finally:
            set_paused(env, "c", paused=False)
        result = run.get_result(120)
    (lost,) = result.rounds[2]["failed"]
    assert lost["cause"] == "Deleted: its run was deleted from the Prefect server"
    assert [entry["attempt"] for entry in result.rounds[2]["accepted"]] == [0, 0, 1]


SUBMITS = """
import numpy as np
from fedpool import FedAvgRecipe, PocEnv

recipe = FedAvgRecipe(name="ahead", min_clients=3, num_rounds=1, model={{"w": np.zeros(2)}}, train_script={script!r})
run = recipe.execute(PocEnv(clients=("a", "b", "c"), home={home!r}, progress=False))
print("rounds:", run.get_result().num_rounds)
"""


def test_a_job_that_is_submitted_by_a_clock_two_minutes_ahead_begins_at_once(env: PocEnv, tmp_path: Path) -> None:
    if find_faketime() is None:
        pytest.skip(FAKETIME_MISSING)
    (tmp_path / "client.py").write_text(textwrap.dedent(ADD_ONE))
    (tmp_path / "job.py").write_text(SUBMITS.format(script=str(tmp_path / "client.py"), home=str(env.home)))
    done = subprocess.run(
        [sys.executable, tmp_path / "job.py"],
        env=os.environ | clock_off_by(120),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,  # by that clock, the job would be due only later
    )
    assert "rounds: 1" in done.stdout, done.stdout
