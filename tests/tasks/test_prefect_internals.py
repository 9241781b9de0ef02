"""Undocumented parts of Prefect that we rely on, each tested on real objects, so an incompatible
Prefect upgrade fails here first.
"""

import asyncio
import contextvars
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiosqlite
import prefect
import pytest
from prefect import flow, get_run_logger, tags, task
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import VariableCreate, WorkPoolCreate
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId, TaskRunFilter, TaskRunFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed, Crashed, Paused, Pending, Running, Scheduled
from prefect.workers.base import BaseJobConfiguration, BaseWorker

from fedpool.deployments.access import Access
from fedpool.deployments.coordinator_worker import CoordinatorWorker
from fedpool.deployments.server import server_environment
from fedpool.deployments.site_worker import SiteWorker
from fedpool.tasks import prefect_internals as internals
from tests.servers import prefect_server


@flow(name="inner")
async def inner(number: int) -> None:
    """Its run is created by hand."""


def with_run(work: Callable[[PrefectClient, FlowRun], Awaitable[None]]) -> None:
    """Call `work` with a run that was created but not started."""

    async def run() -> None:
        async with get_client() as client:
            await work(client, await client.create_flow_run(inner, parameters={"number": 3}, state=Scheduled()))

    asyncio.run(run())


async def lines(client: PrefectClient, run: UUID, count: int) -> list[str]:
    """The run's log messages, once there are `count` of them: they are sent in batches."""
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
    while len(found := await client.read_logs(wanted)) < count:  # noqa: ASYNC110  # another process writes them
        await asyncio.sleep(0.1)
    return [log.message for log in found]


def test_nothing_here_costs_prefect_before_it_is_called() -> None:
    code = "import sys, fedpool.tasks.prefect_internals; print('prefect' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_a_state_that_is_proposed_is_taken_rejected_or_not_allowed(prefect_api: str) -> None:
    async def work(client: PrefectClient, run: FlowRun) -> None:
        taken = await internals.propose(client, Pending(message="mine"), run.id)
        assert taken is not None and taken.is_pending() and taken.message == "mine"
        assert await internals.propose(client, Pending(), run.id) is None  # it is already taken
        assert await internals.propose(client, Running(), run.id) is not None
        await client.set_flow_run_state(run.id, Cancelled(message="by hand"), force=True)
        assert await internals.propose(client, Crashed(), run.id) is None  # it has ended
        assert (await client.read_flow_run(run.id)).state.message == "by hand"  # type: ignore[union-attr]
        with pytest.raises(ObjectNotFound):
            await internals.propose(client, Running(), uuid4())

    with_run(work)


def test_a_paused_run_stays_paused_whatever_is_proposed(prefect_api: str) -> None:
    async def work(client: PrefectClient, run: FlowRun) -> None:
        await client.set_flow_run_state(run.id, Paused(timeout_seconds=60, reschedule=True), force=True)
        paused = await internals.propose(client, Running(), run.id)
        assert paused is not None and paused.is_paused()  # rejected with a Prefect exception

    with_run(work)


def test_a_runs_logger_writes_to_its_log_also_from_a_thread_with_our_context(prefect_api: str) -> None:
    async def work(client: PrefectClient, run: FlowRun) -> None:
        logger = internals.run_logger(run.id, run.name, "inner")
        logger.info("%s", "here")
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: context.run(logger.error, "%s", "there"))
        thread.start()
        thread.join()
        assert await asyncio.wait_for(lines(client, run.id, 2), 60) == ["here", "there"]
        assert logger.extra is not None
        assert (logger.extra["flow_run_name"], logger.extra["flow_name"]) == (run.name, "inner")

    with_run(work)


@task
def step() -> None:
    """A task inside a run that was created by hand."""


def test_in_a_subflows_context_tasks_and_logs_belong_to_the_run_that_was_made_for_it(prefect_api: str) -> None:
    found: dict[str, Any] = {}

    @flow
    async def outer() -> None:
        parent = FlowRunContext.get()
        assert parent is not None
        client = internals.client_of(parent)
        run = await client.create_flow_run(inner, parameters={"number": 3}, state=Running())
        with internals.subflow_context(parent, inner, run):
            now = FlowRunContext.get()
            assert now is not None and now.flow is inner and now.flow_run == run and now.parameters == {"number": 3}
            assert now.task_run_dynamic_keys == {} and now.run_results == {} and now.observed_flow_pauses == {}
            get_run_logger().info("inside")
            step(return_state=True)
        assert FlowRunContext.get() is parent
        step(return_state=True)  # numbered independently of the inner run
        await internals.propose(client, Completed(), run.id)
        found.update(run=run.id, outer=parent.flow_run.id if parent.flow_run else None, client=client)
        assert internals.surrounding_api() == prefect_api
        with tags("a"):
            assert internals.current_tags() == {"a"}

    async def run() -> None:
        await outer()
        async with get_client() as client:
            assert "inside" in await asyncio.wait_for(lines(client, found["run"], 1), 60)
            for which in ("run", "outer"):
                runs = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[found[which]]))
                while not await client.read_task_runs(task_run_filter=runs):  # noqa: ASYNC110  # they are sent in batches
                    await asyncio.sleep(0.1)

    asyncio.run(asyncio.wait_for(run(), 120))
    assert internals.surrounding_api() is None and internals.current_tags() == set()
    assert {"flow", "flow_run", "parameters"} < set(FlowRunContext.model_fields)
    assert {"task_run_dynamic_keys", "observed_flow_pauses", "run_results"} < set(FlowRunContext.model_fields)


@pytest.mark.parametrize(("work", "code"), [("pass", 0), ("raise ValueError", 1), ("raise Abort", 0)])
def test_a_process_that_does_a_run_ends_as_prefects_workers_expect(work: str, code: int) -> None:
    program = f"""
from uuid import uuid4
from prefect.exceptions import Abort
from fedpool.tasks.prefect_internals import engine_signals

with engine_signals(uuid4()):
    {work}
"""
    environment = os.environ | {PREFECT_API_URL.name: "http://127.0.0.1:9/api"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr


def test_what_ends_a_flow_by_a_signal_is_no_error_of_its_own() -> None:
    assert issubclass(internals.termination(), BaseException)
    assert not issubclass(internals.termination(), Exception)


def test_a_worker_tells_a_command_its_run_by_a_variable() -> None:
    configuration = BaseJobConfiguration()
    run = FlowRun.model_validate({"id": uuid4(), "flow_id": uuid4(), "name": "any"})
    configuration.prepare_for_flow_run(run)
    assert configuration.env[internals.FLOW_RUN_VARIABLE] == str(run.id)


def test_the_form_of_a_flow_holds_its_parameters() -> None:
    schema = internals.form_schema(inner)
    assert schema["properties"]["number"]["type"] == "integer" and schema["required"] == ["number"]


def test_a_workers_record_and_a_variable_are_deleted_and_a_second_time_is_harmless(prefect_api: str) -> None:
    async def run() -> None:
        async with get_client() as client:
            name = f"pool-{uuid4().hex[:8]}"
            await client.create_work_pool(WorkPoolCreate(name=name, type="process"))
            await client.send_worker_heartbeat(name, "one", 30)
            assert len(await client.read_workers_for_work_pool(name)) == 1
            for _ in range(2):
                await internals.delete_worker(client, name, "one")
                assert await client.read_workers_for_work_pool(name) == []
            variable = name.replace("-", "_")
            first = await client.create_variable(VariableCreate(name=variable, value=1))
            await internals.delete_variable(client, first.id)
            second = await client.create_variable(VariableCreate(name=variable, value=2))
            await internals.delete_variable(client, first.id)  # it's gone; `second` only has the same name
            assert await client.read_variable_by_name(variable) == second

    asyncio.run(run())


def test_what_the_first_run_imports_is_there() -> None:
    internals.import_for_first_run()
    assert set(internals._FIRST_RUN_IMPORTS) <= set(sys.modules)


def test_the_profile_has_a_name() -> None:
    assert internals.profile_name()


def test_what_this_process_has_logged_is_sent_when_it_is_drained(prefect_api: str) -> None:
    async def work(client: PrefectClient, run: FlowRun) -> None:
        internals.run_logger(run.id, run.name, "inner").info("held")
        await asyncio.to_thread(contextvars.copy_context().run, internals.drain, 30)
        wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
        assert [log.message for log in await client.read_logs(wanted)] == ["held"]

    with_run(work)


def test_what_runs_log_is_kept_off_the_terminal_and_only_that() -> None:
    code = """
import logging
from uuid import uuid4
from prefect.logging import get_logger
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.logging.configuration import setup_logging
from prefect.logging.handlers import APILogWorker, PrefectConsoleHandler
from fedpool.tasks.prefect_internals import quiet_console, run_logger

setup_logging()
logging.getLogger().addHandler(PrefectConsoleHandler())
with quiet_console():
    logging.getLogger("prefect.flow_runs").propagate and logging.getLogger().handle(
        logging.LogRecord("prefect.flow_runs", logging.ERROR, "", 0, "of a run", (), None))
    for worker in APILogWorker(), EventsWorker(NullEventsClient, ()):
        worker._logger.warning("items remaining")
    logging.getLogger().handle(logging.LogRecord("prefect.other", logging.ERROR, "", 0, "of no run", (), None))
logging.getLogger().handle(logging.LogRecord("prefect.flow_runs", logging.ERROR, "", 0, "afterwards", (), None))
"""
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    shown = done.stdout + done.stderr
    assert "of no run" in shown and "afterwards" in shown and "of a run" not in shown and "items" not in shown


SERVER = """
import asyncio
from fedpool.tasks.prefect_internals import server_app, server_database

async def tables():
    database = server_database()
    await database.create_db()
    engine = await database.engine()
    async with engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        print(type(driver).__module__.split(".")[0])
        print(len(list(await driver.execute_fetchall("SELECT version_num FROM alembic_version"))))
    return server_app()

app = asyncio.run(tables())
from prefect.server.api import server
from prefect.settings import get_current_settings
print([router.prefix for router in server.API_ROUTERS][:3])
print(get_current_settings().hash_key())
print(type(app).__name__)
"""


def test_the_server_has_a_database_of_one_connection_and_an_app_with_the_first_routes_first(tmp_path: Path) -> None:
    environment = server_environment(tmp_path, Access.new(9))
    done = subprocess.run([sys.executable, "-c", SERVER], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        aiosqlite.__name__,
        "1",
        "['/flows', '/flow_runs', '/task_runs']",
        "the only one",
        "FastAPI",
    ]


def test_both_uis_keep_the_password_under_the_key_that_our_page_uses() -> None:
    for bundle in (prefect.__ui_static_path__, prefect.__ui_v2_static_path__):
        scripts = "".join(path.read_text() for path in Path(bundle).glob("assets/*.js"))
        assert internals.UI_PASSWORD_KEY in scripts


def test_leases_are_kept_by_a_module_that_a_server_finds(tmp_path: Path) -> None:
    with prefect_server(tmp_path / "server", variables=internals.LASTING_LEASES):
        pass
    (name,) = internals.LASTING_LEASES.values()
    found = subprocess.run(
        [sys.executable, "-c", f"import {name} as m; print(hasattr(m, 'ConcurrencyLeaseStorage'))"],
        capture_output=True,
        text=True,
        env=os.environ | {PREFECT_API_URL.name: "http://127.0.0.1:9/api"},
    )
    assert found.stdout.split() == ["True"], found.stderr


@pytest.mark.parametrize("ours", [SiteWorker, CoordinatorWorker])
def test_prefects_command_starts_a_worker_by_arguments_that_ours_takes(ours: type[BaseWorker[Any, Any, Any]]) -> None:
    wanted = set(inspect.signature(BaseWorker.__init__).parameters) - {"self"}
    taken = inspect.signature(ours.__init__).parameters
    assert any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
    assert {"work_pool_name", "work_queues", "name", "limit", "create_pool_if_not_found", "base_job_template"} <= wanted
    assert list(inspect.signature(BaseWorker.start).parameters) == list(inspect.signature(ours.start).parameters)


IN_A_PROCESS = """
import os, sys
from uuid import UUID
from prefect import flow
from fedpool.tasks.prefect_internals import FLOW_RUN_VARIABLE, run_in_engine

@flow(name="inner")
async def inner(number: int) -> None:
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), 9)
    elif sys.argv[1] == "raises":
        raise ValueError(f"it got {number}")

run_in_engine(UUID(os.environ[FLOW_RUN_VARIABLE]), inner)
"""


@pytest.mark.parametrize(
    ("how", "status", "name", "message"),
    [
        ("ends", 0, "Completed", None),
        ("raises", 0, "Failed", "it got 3"),
        ("killed", -9, "Crashed", "Process exited with status code: -9"),
    ],
)
def test_a_flow_that_runs_in_a_process_of_its_own_reports_how_it_ended(
    how: str, status: int, name: str, message: str | None, prefect_api: str, tmp_path: Path
) -> None:
    (tmp_path / "flow.py").write_text(IN_A_PROCESS)
    pids: list[int] = []
    crashes: list[str] = []

    async def crashed() -> None:
        crashes.append(how)

    async def work(client: PrefectClient, run: FlowRun) -> None:
        await client.set_flow_run_state(run.id, Pending())
        command = [sys.executable, str(tmp_path / "flow.py"), how]
        pid, ended = await internals.run_in_process(
            run, command, folder=str(tmp_path), crashed=crashed, started=pids.append
        )
        assert (pids, ended) == ([pid], status)
        state = (await client.read_flow_run(run.id)).state
        assert state is not None and state.name == name
        assert message is None or message in (state.message or "")

    with_run(work)
    assert crashes == (["killed"] if how == "killed" else [])
