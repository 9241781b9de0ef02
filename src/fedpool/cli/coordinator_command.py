"""The command `fedpool coordinator`: the worker that runs the jobs."""

from typing import Annotated

import httpx
from cyclopts import App, Parameter
from rich.console import Console

from fedpool.deployments.blocking import run_blocking
from fedpool.deployments.remote import COORDINATOR_POOL

coordinator = App(name="coordinator", help="The coordinator: the worker that runs jobs.")


@coordinator.command
def start(
    *,
    pool: Annotated[str, Parameter(help="work pool to poll; it is created if there is none")] = COORDINATOR_POOL,
    name: Annotated[str, Parameter(help="name of the worker, the same after a restart")] = "coordinator",
    store: Annotated[
        list[str] | None, Parameter(help="URL of a store that jobs may be in, repeatable; default: any")
    ] = None,
    limit: Annotated[int | None, Parameter(help="number of jobs that may run at once; default: no limit")] = None,
) -> None:
    """Start the coordinator's worker; it runs until SIGTERM or Ctrl-C."""
    from prefect.settings import PREFECT_API_URL

    from fedpool.deployments.api import check_server
    from fedpool.deployments.coordinator_worker import CoordinatorWorker

    if not PREFECT_API_URL.value():
        check_server()
    worker = CoordinatorWorker(pool, stores=store or (), name=name, limit=limit)
    try:
        run_blocking(worker.start(printer=Console().print))
    except httpx.HTTPError:
        check_server()  # explains a refusal in one sentence
        raise
    except KeyboardInterrupt:  # before the worker installs its own handler
        Console().print(f"Worker {name!r} stopped!")
