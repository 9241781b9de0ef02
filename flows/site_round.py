"""`site_round`: one assignment at one site, one flow run; the site's half of a round.

Waits for the assignment in the store, has the site's script do it, and commits the update to the
store. As a flow, in a process, docker or kubernetes pool, it starts a script for this round only,
with the site's settings from the environment. A `fedpool-site` worker does the same with the job's
warm session, without the flow (sites/piece.py), and reports the run's states itself. Persists no
Prefect result: all results are in the store.
"""

import asyncio
import threading
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from pydantic import Field

from fedpool.sites.config import SiteConfig
from fedpool.sites.desk import SITE_ROUND
from fedpool.sites.piece import RoundAsked, do_round
from fedpool.sites.resident import Resident
from fedpool.tasks.run_states import state_of

ENTRYPOINT = "fedpool.flows.site_round.site_round"


@flow(name=SITE_ROUND, persist_result=False)
async def site_round(
    job_id: str, site: str, round: Annotated[int, Field(ge=0)], attempt: Annotated[int, Field(ge=0)], store: str
) -> State[Any]:
    """Do a site's part of a round.

    Args:
        job_id: the job.
        site: the site that is asked.
        round: the round, from 0.
        attempt: how often the site was asked in this round before.
        store: URL of the store that the job is in; it must be the site's own.

    Returns: Completed; Cancelled if the job or the round ended before the work started here.

    Raises:
        SiteError: the script or the store failed; the run fails with the site, the round and the
            cause in its message.
    """
    logger = get_run_logger()
    resident, stop = Resident(SiteConfig.load(None, name=site)), threading.Event()

    def log(line: str) -> None:
        logger.info("%s", line)

    try:
        asked = RoundAsked(job_id=job_id, site=site, round=round, attempt=attempt, store=store)
        return state_of(await asyncio.to_thread(do_round, resident, asked, stop=stop, log=log))
    finally:
        stop.set()
        await asyncio.to_thread(resident.close)
