"""A run of `site_round` inside a process of ours: who may ask for it, and what Prefect is told of it.

Prefect's own engine would do the same at a higher price: for every run a client, a web socket, a thread and an event loop,
and asks the server for what a site has no use for.
"""

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import anyio
import anyio.to_thread
import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import Abort, ObjectNotFound, ParameterTypeError, Pause
from prefect.logging.loggers import flow_run_logger
from prefect.states import Failed, Running

from fedpool.errors import FedpoolError
from fedpool.flows.site_round import do_site_round, site_round
from fedpool.sites.resident import Resident
from fedpool.storable import storable
from fedpool.tasks.states import report_state

_RETRY_S = 2.0


def check_run(flow: str, parameters: Mapping[str, Any]) -> None:
    """Refuse the run of any flow but `site_round`, and of that with other parameters than its own.

    Args:
        flow: the flow's name.

    Raises:
        PermissionError: it is another one.
    """
    if flow != site_round.name:
        raise PermissionError(f"this site runs {site_round.name} and nothing else: the run of {flow!r} was refused")
    takes = sorted(inspect.signature(site_round.fn).parameters)
    if sorted(parameters) != takes:
        given = ", ".join(sorted(parameters)) or "none"
        raise PermissionError(f"{site_round.name} takes {', '.join(takes)}: a run with {given} was refused")


async def do_run(
    client: PrefectClient, run: FlowRun, resident: Resident, *, stop: threading.Event, note: str | None = None
) -> None:
    """Do what a run asks for, which `check_run` has passed, and report its states; returns when it has ended.

    Args:
        resident: the site that lives here.
        stop: set it to have the run end at once, as cancelled.
        note: the message of its state while it runs.
    """
    # A server that is busy may take seconds to hear that the run has begun: the round does not wait for that.
    beginning = asyncio.create_task(_begin(client, run.id, note, resident, stop))
    logger = flow_run_logger(run, site_round)

    def log(line: str) -> None:
        logger.info("%s", line)

    def work() -> State[Any]:
        return do_site_round(resident, **site_round.validate_parameters(dict(run.parameters)), stop=stop, log=log)

    context = contextvars.copy_context()  # the logger finds its Prefect settings in it
    try:
        # With a limit of its own: the sites' runs wait for their rounds, and would use up the threads of all others.
        ended = await anyio.to_thread.run_sync(context.run, work, limiter=anyio.CapacityLimiter(1))
    except (FedpoolError, ParameterTypeError, OSError) as error:
        cause = storable(str(error))
        logger.error("%s", cause)
        ended = Failed(message=cause)
    except BaseException:
        beginning.cancel()
        raise
    else:
        logger.info("%s: %s", ended.name, ended.message)
    with anyio.CancelScope(shield=True):
        if await beginning:
            await _report(client, run.id, ended, resident)


async def _begin(
    client: PrefectClient, run_id: UUID, note: str | None, resident: Resident, stop: threading.Event
) -> bool:
    """Report that a run has begun; False, and the run stopped, when somebody else has ended it."""
    state = await _report(client, run_id, Running(message=note), resident)
    if state is None or state.is_running():
        return True
    stop.set()
    return False


async def _report(client: PrefectClient, run_id: UUID, state: State[Any], resident: Resident) -> State[Any] | None:
    """Tell the server of a state, as soon as it is there; returns its answer, None when it had none and the site is closing."""
    while True:
        try:
            return await report_state(client, state, run_id)
        except Pause as paused:
            return paused.state
        except Abort:  # the run has ended already, by somebody else's word
            return None if state.is_final() else (await client.read_flow_run(run_id)).state
        except ObjectNotFound:  # someone deleted it
            return None
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                raise
            if resident.closed:
                return None
            await asyncio.sleep(_RETRY_S)
