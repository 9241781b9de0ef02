"""`fedpool site run`: one run of `site_round`, in its own process or container.

It is the command of process, docker and kubernetes pools (see `templates`). It takes only the
parameters of `site_round` from the run. The entrypoint and pull steps of the run's deployment are
ignored, and runs of other flows are refused. The site's settings supply everything that must not
come from outside, such as the site's name.

A refused run is marked as crashed before this process ends. With only an exit code, Prefect's
process worker would load the flow that the deployment names, to look for hooks, and so run what was
refused.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from uuid import UUID

from prefect.client.orchestration import get_client

from fedpool.deployments.prefect_runs import PrefectRuns
from fedpool.errors import ConfigError, ServerError
from fedpool.sites.config import SiteConfig
from fedpool.sites.desk import Phase, Piece, Report, Reports
from fedpool.sites.own_memory import hide_memory
from fedpool.sites.piece import check_piece, do_piece
from fedpool.sites.resident import Resident
from fedpool.tasks.prefect_internals import FLOW_RUN_VARIABLE, engine_signals

_CANCEL_POLL_S = 4.0


def assigned_run(environment: Mapping[str, str] = os.environ) -> UUID:
    """The id of the run that this process was started for.

    Raises:
        ConfigError: this process was not started by a worker.
    """
    text = environment.get(FLOW_RUN_VARIABLE, "")
    try:
        return UUID(text)
    except ValueError:
        raise ConfigError(
            f"{FLOW_RUN_VARIABLE} is {text!r}, not the id of a flow run. `fedpool site run` is for work pools, whose worker "
            "sets this variable: to start a site's own worker, use `fedpool site start`"
        ) from None


def run_assigned(run_id: UUID, load: Callable[[], SiteConfig]) -> bool:
    """Do the site's part of a round, and report it. Main thread only.

    SIGTERM, SIGINT and a cancelled run end the script.

    Args:
        run_id: the run.
        load: reads the site's settings. Errors in them are printed here; the server is told only
            that there are some.

    Returns: whether the run was accepted; its outcome is reported to the server. False: it was
    refused, or the settings are invalid.

    Raises:
        SystemExit: the run is already over (0), or could not be reported (1).
    """
    hide_memory()
    with engine_signals(run_id):
        return asyncio.run(_run(run_id, load))


async def _run(run_id: UUID, load: Callable[[], SiteConfig]) -> bool:
    async with get_client() as client:
        desk = PrefectRuns(client)
        piece = await desk.piece(run_id)
        try:
            check_piece(piece)
            config = load()
            config.check_devices()
            config.sandbox.check_program()
            config.open_store()
        except (PermissionError, ConfigError) as error:
            sys.stderr.write(f"{error}\n")
            refused = isinstance(error, PermissionError)
            message = str(error) if refused else "the site's settings are invalid: see its output"
            await desk.report(piece, Report(Phase.CRASHED, message))
            return False
        with Resident(config) as resident:
            await _do(desk, piece, resident)
    return True


async def _do(desk: Reports, piece: Piece, resident: Resident) -> None:
    """Do a piece, unless it is cancelled or this process is told to end."""
    signalled, stop = asyncio.Event(), threading.Event()

    async def watch() -> None:
        while not signalled.is_set():
            try:
                await asyncio.wait_for(signalled.wait(), _CANCEL_POLL_S)
            except TimeoutError:
                with contextlib.suppress(ServerError):  # no answer: try again at the next look
                    if await desk.cancelled([piece.id]):
                        stop.set()
        await asyncio.to_thread(resident.close)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled.set)
    watching = asyncio.create_task(watch())
    try:
        await do_piece(desk, piece, resident, stop=stop)
    finally:
        if not signalled.is_set():
            watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
