"""Whether sites behind work pools are reachable, from their deployments, pools and workers in
Prefect.

The server decides whether a worker is online. It judges heartbeats by its own clock, so no other
clock matters.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowFilter,
    FlowFilterName,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import WorkerStatus, WorkPool

from fedpool.messages import SITE_PROTOCOL

COORDINATOR_TYPE = "fedpool-coordinator"
"""Type of the pools whose workers run jobs."""

SITE_POOL = "fedpool-site"
"""Type of the pools whose workers do the sites' rounds: a lost worker loses its round."""

NO_WORKER = "no worker online"
PAUSED = "its work pool is paused"

_PAGE = 200


@dataclass(frozen=True, slots=True)
class Place:
    """How to reach a site: its deployment, its work pool, and whether that has site workers."""

    deployment: UUID
    pool: str
    resident: bool


@dataclass(frozen=True, slots=True)
class Pool:
    """The current state of a work pool.

    Attributes:
        offline: whether no worker is online.
        resume: the command that resumes the pool or its queue if an operator has paused it; else
            None.
        kind: its type.
    """

    offline: bool
    resume: str | None = None
    kind: str = ""

    def hinders(self, *, resident: bool, begun: bool) -> str | None:
        """Why a site's run makes no progress, if so.

        Args:
            resident: whether the run is lost with its worker.
            begun: whether a worker has taken the run. A paused pool hands out no more runs but
                leaves running ones alone. In pools that are not of site workers, runs outlive the
                worker that started them.
        """
        if self.offline and (resident or not begun):
            return NO_WORKER
        return PAUSED if self.resume and not begun else None


GONE = Pool(offline=True)
"""A work pool that doesn't exist any more."""


async def find_place(client: PrefectClient, site: str) -> Place:
    """How to reach a site.

    Raises:
        ObjectNotFound: the site is not registered.
    """
    deployment = await client.read_deployment_by_name(f"site-round/{site}")
    pool = deployment.work_pool_name or ""
    return Place(deployment.id, pool, (await client.read_work_pool(pool)).type == SITE_POOL)


async def read_pools(client: PrefectClient, names: Collection[str]) -> dict[str, Pool]:
    """name -> state of a work pool; only for pools that exist."""
    wanted, found = sorted(names), {}
    for start in range(0, len(wanted), _PAGE):
        page = WorkPoolFilter(name=WorkPoolFilterName(any_=wanted[start : start + _PAGE]))
        for pool in await client.read_work_pools(work_pool_filter=page, limit=_PAGE):
            workers = await client.read_workers_for_work_pool(pool.name)
            online = any(worker.status == WorkerStatus.ONLINE for worker in workers)
            # Pools that start containers elsewhere have no workers.
            offline = not online and not (pool.is_push_pool or pool.is_managed_pool)
            found[pool.name] = Pool(offline, await _resume(client, pool), pool.type)
    return found


async def _resume(client: PrefectClient, pool: WorkPool) -> str | None:
    if pool.is_paused:
        return f"prefect work-pool resume {pool.name}"
    queue = await client.read_work_queue(pool.default_queue_id)
    return f"prefect work-queue resume {queue.name} --pool {pool.name}" if queue.is_paused else None


def pool_problem(pool: Pool | None, name: str, start: str) -> str | None:
    """Why a work pool starts no runs now, with the remedy; None if it does.

    Args:
        pool: its state; None: it doesn't exist.
        start: the command that starts a worker of it.
    """
    if pool is None:
        return f"there is no work pool {name!r}: {start}"
    if pool.resume:
        return f"work pool {name!r} is paused: {pool.resume}"
    return f"no worker of work pool {name!r} is online: {start}" if pool.offline else None


def wrong_type(name: str, kind: str) -> str:
    """Why a work pool of another type can't run jobs, with the remedy."""
    return (
        f"work pool {name!r} has the type {kind!r}, whose workers run any command and code that a deployment names; "
        f"{COORDINATOR_TYPE!r} is needed: stop its workers, run `prefect work-pool delete {name}` and "
        f"`fedpool coordinator start --pool {name}`, and deploy scheduled recipes again"
    )


async def site_problems(client: PrefectClient, sites: Sequence[str]) -> dict[str, list[str]]:
    """site -> why it can't take part now, with remedies; only such sites, in the given order."""
    deployments = {}
    for start in range(0, len(sites), _PAGE):
        for deployment in await client.read_deployments(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["site-round"])),
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=list(sites[start : start + _PAGE]))),
            limit=_PAGE,
        ):
            deployments[deployment.name] = deployment
    names = {site: deployment.work_pool_name or site for site, deployment in deployments.items()}
    pools = await read_pools(client, set(names.values()))
    found: dict[str, list[str]] = {}
    for site in sites:
        command = f"fedpool site start --name {site} --store URL"
        if site not in deployments:
            found[site] = [f"site {site!r} is not registered: {command}"]
            continue
        problems, version = [], deployments[site].version
        if version != str(SITE_PROTOCOL):
            problems.append(
                f"site {site!r} speaks protocol {version}, but this version of fedpool speaks {SITE_PROTOCOL}: upgrade it"
            )
        if problem := pool_problem(pools.get(names[site]), names[site], command):
            problems.append(problem)
        if problems:
            found[site] = problems
    return found


def unreachable(places: Mapping[str, Place], pools: Mapping[str, Pool]) -> dict[str, str]:
    """site -> why a run for it would make no progress now; only for such sites.

    Args:
        places: site -> how to reach it.
        pools: name -> current state of the work pool.
    """
    found = {}
    for site, place in places.items():
        pool = pools.get(place.pool, GONE)
        if reason := pool.hinders(resident=place.resident, begun=False):
            found[site] = reason
    return found


async def clock_ahead(client: PrefectClient) -> timedelta:
    """How far this machine's clock is ahead of the server's, to the second; may be negative."""
    answered = (await client.hello()).headers.get("Date")
    return datetime.now(UTC) - parsedate_to_datetime(answered) if answered else timedelta(0)
