"""Redoes the work of simulated sites in virtual time that was lost with a coordinator.

Each site repeats it from the model of its own round, in a new attempt.
"""

import asyncio
from functools import partial

from fedpool.flows.expected import expected
from fedpool.flows.under_way import Job
from fedpool.recipe import SERVER
from fedpool.tasks.answers import Asked, Turn, asked_before
from fedpool.tasks.collect import ask_site
from fedpool.tasks.quorum import Quorum
from fedpool.tasks.used import Counted
from fedpool.tasks.virtual_round import VirtualClock


async def go_on_in_virtual_time(job: Job, clock: VirtualClock) -> None:
    """Have every site continue its current work, except updates that are in the store already."""
    for site, part in clock.schedule.at_work.items():
        found = await asyncio.to_thread(job.store.tree, job.paths.round(part.round))
        before = asked_before(found, lives_on=False).get(site, Asked(0, answered=False))
        round = job.round(part.round, {site: before})
        turn = await asyncio.to_thread(_turn, job, part.round, site)
        clock.go_on(site, turn, partial(ask_site, round, turn, site, before.attempt))


def _turn(job: Job, number: int, site: str) -> Turn:
    """The site's assignment in a committed round."""
    record = job.records[number]
    base = job.global_model(number, record.base, submitted=record.model.owner != SERVER)
    wanted = expected(
        job.recipe, job.strategy, job.job_id, number, record.task, record.base, base, job.holes, job.arithmetic
    )
    shared = job.strategy.shared and record.task == "train"
    counted = Counted(job.recipe.aggregation_weights)
    counted.follow(job.records[:number])
    return Turn(
        record.task,
        record.base,
        wanted,
        state=job.records[number - 1].state if shared and number > 0 else None,
        deadline=None,
        quorum=Quorum(min_clients=1),
        sites=(site,),
        probes=(),
        used=counted.used((site,)) if shared else {},
    )
