"""What we use of Prefect that it does not document: names, signatures and behaviour that its next
version may change.

All of it is here and nowhere else, so that an upgrade of Prefect fails in one place:
tests/tasks/test_prefect_internals.py holds what each function relies on against real objects, and
tests/test_layers.py that no other module names any. Nothing here imports Prefect before it is
called. What Prefect documents is imported where it is used.
"""

import logging
from collections.abc import Callable, Iterator
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
"""Where every worker of Prefect puts the id of the run that a command is for."""

LASTING_LEASES = {
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}
"""By these variables a server remembers over its restarts which run holds a deployment's slot."""

_FIRST_RUN_IMPORTS = (
    "prefect.flow_engine",
    "prefect.task_engine",
    "prefect.events.worker",
    "prefect.utilities.visualization",
    "fastapi.encoders",
    "anyio._backends._asyncio",
)

_ASKED_FIRST = ("/flows", "/flow_runs", "/task_runs", "/logs", "/artifacts", "/events")
"""What simulations need of the API."""

# A run, from outside of Prefect's engine


async def propose(client: "PrefectClient", state: "State[Any]", run_id: UUID) -> "State[Any] | None":
    """Propose a state of a flow run, as Prefect's engine does.

    Returns: the state that the run is in now, which is another one where the server has rejected
        this one. None when the server does not allow it at all: no crash after the run's end,
        nothing pending when somebody has taken the run. Another end replaces it.

    Raises:
        ObjectNotFound: there is no such run.
        httpx.HTTPError: the server does not answer, or refuses.
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


def run_logger(run_id: UUID, name: str, flow: str) -> "logging.LoggerAdapter[logging.Logger]":
    """A logger whose lines go to the log of a flow run, from any thread that has Prefect's
    settings in its context.
    """
    from prefect.logging.loggers import flow_run_logger

    return flow_run_logger(flow_run_id=run_id, flow_run_name=name, flow_name=flow)


def client_of(context: "FlowRunContext") -> "PrefectClient":
    """The client of the flow run that we are in, an asynchronous one."""
    from prefect.client.orchestration import PrefectClient

    client = context.client
    assert isinstance(client, PrefectClient), "the flow is asynchronous"
    return client


def subflow_context(parent: "FlowRunContext", flow: "Flow[..., Any]", run: "FlowRun") -> AbstractContextManager[object]:
    """What Prefect's engine sets up for a subflow: tasks and logs inside belong to its run.

    The engine also looks for a run to go on with, names it and reads it back, each by a request:
    that is left out.
    """
    own = {"flow": flow, "flow_run": run, "parameters": run.parameters}
    fresh: dict[str, object] = {"task_run_dynamic_keys": {}, "observed_flow_pauses": {}, "run_results": {}}
    return parent.model_copy(update=own | fresh)


def current_tags() -> set[str]:
    """The tags that a run which is created here is to have."""
    from prefect.context import TagsContext

    return TagsContext.get().current_tags


def termination() -> type[BaseException]:
    """What a signal that ends the process is raised as, inside a flow that Prefect's engine
    runs.
    """
    from prefect.exceptions import TerminationSignal

    return TerminationSignal


def engine_signals(run_id: UUID) -> AbstractContextManager[None]:
    """Ends the process as Prefect's workers expect of one that does a run: 0 when the run is
    over already, 1 by an error.
    """
    from prefect.engine import handle_engine_signals

    return handle_engine_signals(run_id)


def form_schema(flow: "Flow[..., Any]") -> dict[str, Any]:
    """The schema of a flow's parameters as a deployment holds it, by which the UI makes a form."""
    from prefect.utilities.callables import parameter_schema

    return parameter_schema(flow).model_dump_for_openapi()


# Requests that the client has no method for


async def delete_worker(client: "PrefectClient", pool: str, name: str) -> None:
    """Remove a worker's record, so that it is offline at once. Harmless when there is none."""
    await _delete(client, "/work_pools/{work_pool_name}/workers/{name}", {"work_pool_name": pool, "name": name})


async def delete_variable(client: "PrefectClient", variable: UUID) -> None:
    """Remove a variable by its id, which touches no later one of its name. Harmless when there
    is none.
    """
    await _delete(client, "/variables/{id}", {"id": str(variable)})


async def _delete(client: "PrefectClient", path: str, path_params: dict[str, str]) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        await client.request("DELETE", path, path_params=path_params)  # type: ignore[arg-type]  # a literal of each of its paths
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 404:
            raise


# Prefect in this process


def import_for_first_run() -> None:
    """Import what Prefect imports when the first flow runs: while a server is still starting
    that costs no time.
    """
    for name in _FIRST_RUN_IMPORTS:
        import_module(name)


def surrounding_api() -> str | None:
    """The API that a flow or a task around us runs on, though none is configured: Prefect has
    started a server for it.
    """
    from prefect.context import FlowRunContext, TaskRunContext

    around = FlowRunContext.get() or TaskRunContext.get()
    return None if around is None else str(around.client.api_url).rstrip("/")


def profile_name() -> str:
    """The Prefect profile whose settings count."""
    from prefect.context import get_settings_context

    return get_settings_context().profile.name


def drain(timeout_s: float) -> None:
    """Send the logs and events that this process still holds; what is not sent in that time is
    lost.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=timeout_s, at_exit=False)
    EventsWorker.drain_all(timeout=timeout_s, at_exit=False)


@contextmanager
def quiet_console() -> Iterator[None]:
    """Keep what runs log off the terminal."""
    from prefect.logging.handlers import PrefectConsoleHandler

    def is_not_of_a_run(record: logging.LogRecord) -> bool:
        return not record.name.startswith(("prefect.flow_runs", "prefect.task_runs", "prefect.engine"))

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
    """The database of the server that this process is: `engine()`, an SQLAlchemy engine, and
    `create_db()`, which migrates.
    """
    from prefect.server.database import provide_database_interface

    return provide_database_interface()


def server_app() -> Callable[..., Any]:
    """Prefect's server as an ASGI app, made ready for the first runs as early as can be. Once
    per process.
    """
    from prefect.server.api import server
    from prefect.settings import Settings

    def rank(router: Any) -> int:
        return _ASKED_FIRST.index(router.prefix) if router.prefix in _ASKED_FIRST else len(_ASKED_FIRST)

    # FastAPI prepares all routes up to the one that a request is for, each when the first request
    # passes by.
    server.API_ROUTERS = tuple(sorted(server.API_ROUTERS, key=rank))  # type: ignore[assignment]
    # By this key Prefect tells the apps of one process apart, and to make it takes as long as some
    # requests: here there is one.
    Settings.hash_key = _hash_key  # type: ignore[assignment,method-assign]
    return server.create_app()


def _hash_key(settings: Any) -> str:
    return "the only one"
