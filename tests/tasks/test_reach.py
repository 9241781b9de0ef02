"""What a work pool's state means for a run that waits in it."""

import asyncio

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from fedpool.deployments.prefect_desk import register_site
from fedpool.tasks.dispatch import PoolSites
from fedpool.tasks.reach import NO_WORKER, PAUSED, Pool

RESUME = "prefect work-pool resume a"


@pytest.mark.parametrize(
    ("pool", "resident", "begun", "hindrance"),
    [
        (Pool(offline=False), True, False, None),
        (Pool(offline=True), True, True, NO_WORKER),  # the worker was running the round itself
        (Pool(offline=True), False, True, None),  # a container outlives its worker
        (Pool(offline=True), False, False, NO_WORKER),
        (Pool(False, RESUME), True, False, PAUSED),
        (Pool(False, RESUME), True, True, None),  # a run that has begun continues
        (Pool(True, RESUME), True, True, NO_WORKER),
    ],
)
def test_what_hinders_a_run(pool: Pool, resident: bool, begun: bool, hindrance: str | None) -> None:
    assert pool.hinders(resident=resident, begun=begun) == hindrance


def test_a_site_that_is_registered_anew_in_another_pool_can_be_reached_there(prefect_api: str) -> None:
    async def moved() -> list[dict[str, str]]:
        async with get_client() as client:
            for pool in ("before", "after"):
                await client.create_work_pool(WorkPoolCreate(name=f"moves-{pool}", type="process"))
            await register_site(client, "moves", "moves-before")
            sites = PoolSites(["moves"])
            told = [await sites.unreachable(["moves"])]
            await client.send_worker_heartbeat("moves-after", "worker", heartbeat_interval_seconds=30)
            await register_site(client, "moves", "moves-after")
            told.append(await sites.unreachable(["moves"]))
            await sites.end()
            return told

    assert asyncio.run(moved()) == [{"moves": NO_WORKER}, {}]
