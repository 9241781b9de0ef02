"""A script that prints, logs and raises text that the database refuses: PostgreSQL allows no NUL in
text.
"""

import asyncio
from collections.abc import Callable, Iterator

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, Log
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Failed

from fedpool import JobFailed, Run
from fedpool.deployments.access import Access
from fedpool.tasks.run_states import report_state
from tests.servers import prefect_server
from tests.services import PostgresServer

NUL = """
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        print("printed\\0 here")
        flare.log("logged\\0", 1.0)
        if model.current_round == 1:
            raise ValueError("my own\\0 error")
        flare.send(flare.FLModel(params=model.params, metrics={"a\\0b": 0.5}))
"""


@pytest.fixture(scope="module")
def on_postgres(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    """A Prefect server with its own database, which this process is configured with."""
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home, postgres.new_database()) as access, temporary_settings(access.settings()):
        yield access


def test_a_job_whose_scripts_say_nul_fails_with_its_cause(on_postgres: Access, run_job: Callable[..., Run]) -> None:
    with temporary_settings(on_postgres.settings()):
        run = run_job(NUL, name="says-nul", num_rounds=3)
        with pytest.raises(JobFailed, match=r"ValueError: my own\\x00 error"):
            run.get_result()
        runs, logs = asyncio.run(_read())
    states = {run.name: run.state_name for run in runs}
    assert (states["says-nul"], states["says-nul round 0"], states["says-nul round 1"]) == (
        "Failed",
        "Completed",
        "Failed",
    )
    (failed,) = (run for run in runs if run.name == "says-nul round 1")
    assert failed.state is not None and r"my own\x00 error" in (failed.state.message or "")
    messages = {log.message for log in logs}
    assert r"site-1: printed\x00 here" in messages and r"site-1: logged\x00 = 1" in messages
    assert run.get_progress().last_record.metrics == {r"a\x00b": 0.5}  # type: ignore[union-attr]


async def _read() -> tuple[list[FlowRun], list[Log]]:
    async with get_client() as client:
        runs = await client.read_flow_runs()
        ids = [run.id for run in runs]
        return runs, await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=ids)), limit=200)


def test_a_state_that_the_server_refuses_is_reported_without_its_message(on_postgres: Access) -> None:
    @flow
    def refused() -> None:
        return None

    async def report() -> FlowRun:
        async with get_client() as client:
            run = await client.create_flow_run(refused)
            await report_state(client, Failed(message="a NUL: \x00"), run.id)
            return await client.read_flow_run(run.id)

    with temporary_settings({**on_postgres.settings(), PREFECT_CLIENT_MAX_RETRIES: 0}):
        state = asyncio.run(report()).state
    assert state is not None and state.is_failed()
    assert state.message == "the server refused this state's message (HTTP 503): see the job's record in the store"
