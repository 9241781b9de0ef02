"""`fedpool site run`: one run of `site_round`, in a process or a container of its own.

It is the command of process, docker and kubernetes pools (see `templates`). Of the run it takes the parameters of `site_round`;
entrypoint and pull steps of the run's deployment are never looked at, and the run of any other flow is refused. What must not
come from outside, the site's name among it, comes from the site's settings.

A refused run is marked as crashed before this process ends: the exit code alone would have Prefect's process worker load the flow
that the deployment names, to look for hooks, and so run what was refused.
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.engine import handle_engine_signals
from prefect.exceptions import PrefectException
from prefect.states import Crashed

from fedpool.deployments.site_run import check_run, do_run
from fedpool.errors import ConfigError
from fedpool.sites.config import SiteConfig
from fedpool.sites.resident import Resident

RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
"""Where every worker of Prefect puts the id of the run that a command is for."""

_CANCEL_POLL = timedelta(seconds=4)


def assigned_run(environment: Mapping[str, str] = os.environ) -> UUID:
    """The id of the run that this process was started for.

    Raises:
        ConfigError: no worker has started it.
    """
    text = environment.get(RUN_VARIABLE, "")
    try:
        return UUID(text)
    except ValueError:
        raise ConfigError(
            f"{RUN_VARIABLE} is {text!r}, not the id of a flow run: `fedpool site run` is the command of a work pool, whose "
            "worker sets it; `fedpool site start` is a site's own worker"
        ) from None


def run_assigned(run_id: UUID, load: Callable[[], SiteConfig]) -> bool:
    """Do the site's part of a round, and report it. SIGTERM, SIGINT and a cancelled run end the script. Main thread only.

    Args:
        run_id: the run.
        load: reads the site's settings. What is wrong with them is printed here; the server is told only that something is.

    Returns: whether the run was taken on; how it ended is for the server. False: it was refused, or the settings do not fit.

    Raises:
        SystemExit: the run is over already (0), or could not be reported (1).
    """
    with handle_engine_signals(run_id), get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
        try:
            check_run(client.read_flow(run.flow_id).name, run.parameters)
            config = load()
            config.check_devices()
        except (PermissionError, ConfigError) as error:
            sys.stderr.write(f"{error}\n")
            refused = isinstance(error, PermissionError)
            message = str(error) if refused else "the site's settings are invalid: its output says why"
            client.set_flow_run_state(run_id, Crashed(message=message), force=True)
            return False
        _Round(config, run, client).work()
    return True


class _Round:
    """A run, on a thread of its own: Prefect's engine would take over the signals of the main thread."""

    def __init__(self, config: SiteConfig, run: FlowRun, client: SyncPrefectClient) -> None:
        self._run = run
        self._client = client
        self._resident = Resident(config)
        self._stop = threading.Event()
        self._signalled = False
        self._wake = threading.Event()

    def work(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        with ThreadPoolExecutor(1, thread_name_prefix="fedpool-site-round") as thread, self._resident:
            done = thread.submit(self._run_site_round)
            done.add_done_callback(lambda _: self._wake.set())
            while not done.done():
                self._wake.wait(_CANCEL_POLL.total_seconds())
                self._wake.clear()
                if done.done():
                    break
                if self._is_cancelled():
                    self._stop.set()
                elif self._signalled:
                    self._resident.close()
        done.result()

    def _run_site_round(self) -> None:
        async def run() -> None:
            async with get_client() as client:
                await do_run(client, self._run, self._resident, stop=self._stop)

        asyncio.run(run())

    def _on_signal(self, *_: object) -> None:
        self._signalled = True
        self._wake.set()

    def _is_cancelled(self) -> bool:
        try:
            state = self._client.read_flow_run(self._run.id).state
        except (httpx.HTTPError, PrefectException):  # the server is unreachable: the next look may find it
            return False
        return state is not None and (state.is_cancelling() or state.is_cancelled())
