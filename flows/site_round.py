"""`site_round`: one assignment at one site, one flow run; the site's half of a round.

Waits for the assignment to be written to the store, has the site's script do it, and commits the update there. Inside a
`fedpool-site` worker it finds the job's warm session; anywhere else (a process, docker or kubernetes pool) it starts one for
this round alone, with the site's settings from the environment. Persists no result: what it leaves is in the store.
"""

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Crashed
from pydantic import Field

from fedpool.errors import SiteError
from fedpool.sites.config import SiteConfig
from fedpool.sites.resident import Resident

ENTRYPOINT = "fedpool.flows.site_round.site_round"

_HOST: contextvars.ContextVar[tuple[Resident, threading.Event] | None] = contextvars.ContextVar("host", default=None)


@contextmanager
def hosted_by(resident: Resident, stop: threading.Event) -> Iterator[None]:
    """Have `site_round` inside find a warm site, and an event that stops it."""
    token = _HOST.set((resident, stop))
    try:
        yield
    finally:
        _HOST.reset(token)


@flow(name="site-round", persist_result=False)
async def site_round(job_id: str, site: str, round: Annotated[int, Field(ge=0)], store: str) -> State[Any]:
    """Do a site's part of a round.

    Args:
        job_id: the job.
        site: the site that is asked.
        round: the round, from 0.
        store: URL of the store that the job lies in.

    Returns: Completed; Cancelled when the job ended before the round began; Crashed when the site was stopped.

    Raises:
        SiteError: the script or the store failed; the run fails with the site, the round and the cause in its message.
    """
    logger = get_run_logger()
    hosted = _HOST.get()
    if hosted is None:
        resident, stop = Resident(SiteConfig.load(None, name=site)), threading.Event()
    else:
        resident, stop = hosted
    if resident.config.name != site:
        raise SiteError(site, round, f"this is {resident.config.name}: the run was sent to the wrong work pool")
    try:
        came = await asyncio.to_thread(
            resident.perform, job_id, round, store=store, stop=stop, log=lambda line: logger.info("%s", line)
        )
    except SiteError:
        if resident.closed:
            return Crashed(message="the site was stopped before it had done its part")
        if stop.is_set():
            return Cancelled(message="it was cancelled")
        raise
    finally:
        if hosted is None:
            stop.set()
            await asyncio.to_thread(resident.close)
    if not came:
        return Cancelled(message="the job ended before this round's turn")
    return Completed(message=f"{site} has done its part of round {round}")
