"""`site_round`: one assignment at one site, one flow run; the site's half of a round.

Waits for the assignment to be written to the store, has the site's script do it, and commits the update there. As a flow, in a
process, docker or kubernetes pool, it starts a script for this round alone, with the site's settings from the environment.
A `fedpool-site` worker calls `do_site_round` with the job's warm session and reports the run's states itself. Persists no result:
what it leaves is in the store.
"""

import asyncio
import threading
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Crashed
from pydantic import Field

from fedpool.errors import SiteError
from fedpool.sites.config import SiteConfig
from fedpool.sites.output import LogLine
from fedpool.sites.resident import Resident

ENTRYPOINT = "fedpool.flows.site_round.site_round"


@flow(name="site-round", persist_result=False)
async def site_round(
    job_id: str, site: str, round: Annotated[int, Field(ge=0)], attempt: Annotated[int, Field(ge=0)], store: str
) -> State[Any]:
    """Do a site's part of a round.

    Args:
        job_id: the job.
        site: the site that is asked.
        round: the round, from 0.
        attempt: how often the site has been asked in this round before.
        store: URL of the store that the job lies in.

    Returns: Completed; Cancelled when the job, or the round, was over before it began here.

    Raises:
        SiteError: the script or the store failed; the run fails with the site, the round and the cause in its message.
    """
    logger = get_run_logger()
    resident, stop = Resident(SiteConfig.load(None, name=site)), threading.Event()

    def log(line: str) -> None:
        logger.info("%s", line)

    try:
        return await asyncio.to_thread(do_site_round, resident, job_id, site, round, attempt, store, stop=stop, log=log)
    finally:
        stop.set()
        await asyncio.to_thread(resident.close)


def do_site_round(
    resident: Resident,
    job_id: str,
    site: str,
    round: int,
    attempt: int,
    store: str,
    *,
    stop: threading.Event,
    log: LogLine,
) -> State[Any]:
    """Do a site's part of a round with the warm site that lives here; see `site_round`. Blocks; belongs on a thread.

    Args:
        stop: set it to have it end at once.
        log: called with each line that the script prints.

    Returns: Completed; Cancelled when the job, or the round, was over before it began here, or it was stopped; Crashed when the
        site was.

    Raises:
        SiteError: the script or the store failed, or the run was meant for another site.
    """
    if resident.config.name != site:
        raise SiteError(site, round, f"this is {resident.config.name}: the run was sent to the wrong work pool")
    try:
        came = resident.perform(job_id, round, attempt, store=store, stop=stop, log=log)
    except SiteError:
        if resident.closed:
            return Crashed(message="the site was stopped before it had done its part")
        if stop.is_set():
            return Cancelled(message="it was cancelled")
        raise
    if not came:
        return Cancelled(message="the round was over, or the job, before it had begun here")
    return Completed(message=f"{site} has done its part of round {round}")
