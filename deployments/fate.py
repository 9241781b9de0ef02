"""The status of jobs without a result in the store: they are running, or were lost."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from fedpool.deployments.api import open_client
from fedpool.deployments.blocking import run_blocking
from fedpool.deployments.handle import JobStatus
from fedpool.errors import ConfigError, ServerError
from fedpool.store import Store

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

T = TypeVar("T")
_AT_ONCE = 200


async def with_client(use: Callable[["PrefectClient"], Awaitable[T]]) -> T:
    """Use a client for the Prefect server.

    Raises:
        ServerError: the server does not answer, or refuses.
    """
    async with open_client() as client:
        return await use(client)


Server = Callable[[], AbstractContextManager[None]]
"""A context manager that selects a Prefect server."""


def fates(store: Store, jobs: Sequence[tuple[str, bool]], server: Server | None = None) -> dict[str, JobStatus]:
    """job -> RUNNING, FAILED or CANCELLED, for jobs without a result; unknown jobs are left out.

    A simulation holds its folder while it runs. Other jobs are looked up on the Prefect server, if
    it answers.

    Args:
        jobs: the jobs' ids, and whether each is simulated.
        server: the server to ask, if any.
    """
    found = {}
    for job_id, simulated in jobs:
        if simulated and (held := store.is_held(job_id)) is not None:
            found[job_id] = JobStatus.RUNNING if held else JobStatus.FAILED
    elsewhere = [job_id for job_id, simulated in jobs if not simulated]
    for start in range(0, len(elsewhere), _AT_ONCE):
        page = elsewhere[start : start + _AT_ONCE]
        if server is None:
            break
        with suppress(ServerError, ConfigError, httpx.HTTPError), server():
            found |= run_blocking(with_client(lambda client, page=page: _of_runs(client, page)))  # type: ignore[misc]
    return found


async def _of_runs(client: "PrefectClient", job_ids: Sequence[str]) -> dict[str, JobStatus]:
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    runs: list[Any] = await client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=["federated-job"])),
        flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=list(job_ids))),
        sort=FlowRunSort.START_TIME_ASC,
        limit=_AT_ONCE,
    )
    found: dict[str, JobStatus] = {}
    for run in runs:  # a job's last run wins, but any unfinished run beats it
        over = run.state is not None and run.state.is_final()
        if not over:
            found[run.name] = JobStatus.RUNNING
        elif found.get(run.name) is not JobStatus.RUNNING:
            found[run.name] = JobStatus.CANCELLED if run.state.is_cancelled() else JobStatus.FAILED
    return found
