"""Undocumented parts of Prefect that we use: names, signatures, behaviour. The next version may
change them.

They are all here, so an upgrade of Prefect fails in one place.
tests/tasks/test_prefect_internals.py checks each function's assumptions against real objects.
tests/test_layers.py checks that no other module uses such names. Importing this module doesn't
import Prefect. Documented parts of Prefect are imported where they are used.
"""

import logging
import shlex
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun, State
    from prefect.context import FlowRunContext

FLOW_RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
"""The variable in which every Prefect worker passes the id of the flow run."""

UI_PASSWORD_KEY = "prefect-password"
"""The key under which the UI keeps the password, in base64, in the browser's local storage."""

LASTING_LEASES = {
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}
"""With these variables, a restarted server remembers which run holds a deployment's slot."""

_FIRST_RUN_IMPORTS = (
    "prefect.flow_engine",
    "prefect.task_engine",
    "prefect.events.worker",
    "prefect.utilities.visualization",
    "fastapi.encoders",
    "anyio._backends._asyncio",
)

_ASKED_FIRST = ("/flows", "/flow_runs", "/task_runs", "/logs", "/artifacts", "/events")
"""The parts of the API that simulations need."""

# A run, from outside Prefect's engine


async def propose(client: "PrefectClient", state: "State[Any]", run_id: UUID) -> "State[Any] | None":
    """Propose a state of a flow run, as Prefect's engine does.

    Returns: the state that the run is in now; a different one if the server rejected the proposal.
    None if the server refuses: a crash after the run has ended, or pending after a worker has taken
    the run. A final state replaces another.

    Raises:
        ObjectNotFound: the run doesn't exist.
        httpx.HTTPError: the server doesn't answer, or refuses.
    """
    from prefect.exceptions import Abort, Pause
    from prefect.utilities.engine import propose_state

    try:
        return await propose_state(client, state, flow_run_id=run_id)
    except Pause as paused:
        found: State[Any] | None = paused.state
        return found
    except Abort:
        return None


async def run_in_process(
    run: "FlowRun",
    command: Sequence[str],
    *,
    folder: str,
    crashed: Callable[[], Awaitable[None]],
    started: Callable[[int], None],
) -> tuple[int, int]:
    """Run a flow run by a command, as Prefect's process worker does; returns pid and exit status.

    Notices when the run is cancelled, and then ends the process: SIGTERM, SIGKILL after 30 s.
    Prefect's own worker would load the flow that the deployment names, to call its hooks. This
    loads nothing.

    Args:
        folder: the current folder of the process.
        crashed: called after the run was found to have crashed.
        started: called with the pid.
    """
    import anyio
    from prefect.runner._flow_run_executor import FlowRunExecutorContext
    from prefect.runner._starter_engine import EngineCommandStarter

    class Hooks:
        async def run_cancellation_hooks(self, flow_run: Any, state: Any) -> None:
            return

        async def run_crashed_hooks(self, flow_run: Any, state: Any) -> None:
            await crashed()

    async with FlowRunExecutorContext() as context:
        starter = EngineCommandStarter(command=shlex.join(command), cwd=folder, control_channel=context.control_channel)
        executor = context.create_executor(run, starter, hook_runner=Hooks(), propose_submitting=False)
        ended: Any = None

        async def execute(*, task_status: Any) -> None:
            nonlocal ended
            ended = await executor.submit(task_status=task_status)

        async with anyio.create_task_group() as tasks:
            handle = await tasks.start(execute)
            started(handle.pid)
    return handle.pid, handle.returncode if ended is None else ended.status_code


def run_in_engine(run_id: UUID, flow: "Flow[..., Any]") -> None:
    """Run an asynchronous flow as a flow run in this process, as `prefect.engine` does.

    Call it in the main thread of the process that `run_in_process` started: it reports the run's
    states, and its end when it is cancelled.

    Raises:
        SystemExit: the run has ended otherwise than by itself.
    """
    import asyncio

    from prefect._internal.control_listener import configure_from_env
    from prefect.flow_engine import load_flow_run, run_flow
    from prefect.logging.loggers import flow_run_logger

    configure_from_env()
    with engine_signals(run_id):
        run = load_flow_run(run_id)
        asyncio.run(run_flow(flow, flow_run=run, error_logger=flow_run_logger(run)))  # type: ignore[arg-type]


def run_logger(run_id: UUID, name: str, flow: str) -> "logging.LoggerAdapter[logging.Logger]":
    """A logger to a flow run's log, from any thread that has Prefect's settings in its context."""
    from prefect.logging.loggers import flow_run_logger

    return flow_run_logger(flow_run_id=run_id, flow_run_name=name, flow_name=flow)


def client_of(context: "FlowRunContext") -> "PrefectClient":
    """The asynchronous client of the current flow run."""
    from prefect.client.orchestration import PrefectClient

    client = context.client
    assert isinstance(client, PrefectClient), "the flow is asynchronous"
    return client


def subflow_context(parent: "FlowRunContext", flow: "Flow[..., Any]", run: "FlowRun") -> AbstractContextManager[object]:
    """The context that Prefect's engine sets up for a subflow: tasks and logs inside belong to its
    run.

    The engine also looks for a run to continue, names it and reads it back, with a request each.
    This skips those.
    """
    own = {"flow": flow, "flow_run": run, "parameters": run.parameters}
    fresh: dict[str, object] = {"task_run_dynamic_keys": {}, "observed_flow_pauses": {}, "run_results": {}}
    return parent.model_copy(update=own | fresh)


def current_tags() -> set[str]:
    """The tags for a run that is created here."""
    from prefect.context import TagsContext

    return TagsContext.get().current_tags


def termination() -> type[BaseException]:
    """The exception that a terminating signal raises inside a flow run by Prefect's engine."""
    from prefect.exceptions import TerminationSignal

    return TerminationSignal


def engine_signals(run_id: UUID) -> AbstractContextManager[None]:
    """Exit as Prefect's workers expect: 0 if the run has ended already, 1 after an error."""
    from prefect.engine import handle_engine_signals

    return handle_engine_signals(run_id)


def form_schema(flow: "Flow[..., Any]") -> dict[str, Any]:
    """The schema of a flow's parameters as in a deployment; the UI makes its form from it."""
    from prefect.utilities.callables import parameter_schema

    return parameter_schema(flow).model_dump_for_openapi()


# Requests that the client has no method for


async def delete_worker(client: "PrefectClient", pool: str, name: str) -> None:
    """Remove a worker's record, so it is offline at once. Does nothing if there is none."""
    await _delete(client, "/work_pools/{work_pool_name}/workers/{name}", {"work_pool_name": pool, "name": name})


async def delete_variable(client: "PrefectClient", variable: UUID) -> None:
    """Remove a variable by its id, which spares a newer one of the same name, if it exists."""
    await _delete(client, "/variables/{id}", {"id": str(variable)})


async def _delete(client: "PrefectClient", path: str, path_params: dict[str, str]) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        await client.request("DELETE", path, path_params=path_params)  # type: ignore[arg-type]  # it expects a literal path
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 404:
            raise


# Prefect in this process


def import_for_first_run() -> None:
    """Import Prefect's modules for the first flow run; takes no time while a server is starting."""
    for name in _FIRST_RUN_IMPORTS:
        import_module(name)


def surrounding_api() -> str | None:
    """The API of the surrounding run, if Prefect started a server for it; else None."""
    from prefect.context import FlowRunContext, TaskRunContext

    around = FlowRunContext.get() or TaskRunContext.get()
    return None if around is None else str(around.client.api_url).rstrip("/")


def profile_name() -> str:
    """The active Prefect profile."""
    from prefect.context import get_settings_context

    return get_settings_context().profile.name


def drain(timeout_s: float) -> None:
    """Send the logs and events that this process still holds. Those not sent in time are lost."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=timeout_s, at_exit=False)
    EventsWorker.drain_all(timeout=timeout_s, at_exit=False)


@contextmanager
def quiet_console() -> Iterator[None]:
    """Keep the logs of runs off the terminal, and what Prefect says while it sends them."""
    from prefect.logging.handlers import PrefectConsoleHandler

    hidden = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine", "APILogWorker", "EventsWorker")

    def is_not_of_a_run(record: logging.LogRecord) -> bool:
        return not record.name.startswith(hidden)

    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, PrefectConsoleHandler)]
    for handler in handlers:
        handler.addFilter(is_not_of_a_run)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_not_of_a_run)


# The server, in its own process


def server_database() -> Any:
    """The database of this process's server: an SQLAlchemy `engine()`; `create_db()` migrates."""
    from prefect.server.database import provide_database_interface

    return provide_database_interface()


def server_app() -> Callable[..., Any]:
    """Prefect's server as an ASGI app that is ready for the first runs early. Once per process."""
    from prefect.server.api import server
    from prefect.settings import Settings

    def rank(router: Any) -> int:
        return _ASKED_FIRST.index(router.prefix) if router.prefix in _ASKED_FIRST else len(_ASKED_FIRST)

    # FastAPI prepares the routes up to the requested one, each when the first request reaches it.
    server.API_ROUTERS = tuple(sorted(server.API_ROUTERS, key=rank))  # type: ignore[assignment]
    # Prefect distinguishes the apps of one process by this key. Computing it takes as long as
    # several requests, and there is only one app here.
    Settings.hash_key = _hash_key  # type: ignore[assignment,method-assign]
    return server.create_app()


def _hash_key(settings: Any) -> str:
    return "the only one"
