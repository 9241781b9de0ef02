"""A job's runs on the Prefect server."""

import asyncio
from typing import TYPE_CHECKING

from fedpool.errors import ConfigError
from fedpool.patience import pauses

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

_PAGE = 200
_POLL_S = 0.5


async def find_run(client: "PrefectClient", job_id: str) -> "FlowRun":
    """The flow run of a job.

    Raises:
        ConfigError: the server has none.
    """
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    runs = await client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=["federated-job"])),
        flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[job_id])),
        sort=FlowRunSort.START_TIME_DESC,
        limit=1,
    )
    if not runs:
        raise ConfigError(
            f"the Prefect server at {client.api_url} has no run of job {job_id!r}. `fedpool job show {job_id}` shows what "
            f"became of the job, `fedpool job resume {job_id}` continues it"
        )
    return runs[0]


async def read_logs(client: "PrefectClient", job_id: str, site: str | None) -> list[tuple[str, str]]:
    """The log of a job's runs: (run's name, line), by time.

    Args:
        site: only lines of this site's runs, which are the output of its script.

    Raises:
        ConfigError: the server has no such job.
    """
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import LogSort

    job = await find_run(client, job_id)
    at_sites = FlowRunFilter(name=FlowRunFilterName(like_=f"{job_id} round "))
    names = {} if site else {job.id: job.name}
    offset = 0
    while page := await client.read_flow_runs(flow_run_filter=at_sites, limit=_PAGE, offset=offset):
        names |= {run.id: run.name for run in page if site is None or run.name.endswith(f" {site}")}
        offset += len(page)
    lines: list[tuple[str, str]] = []
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=list(names)))
    while logs := await client.read_logs(wanted, limit=_PAGE, offset=len(lines), sort=LogSort.TIMESTAMP_ASC):
        lines += [(names[log.flow_run_id] if log.flow_run_id else "", log.message) for log in logs]
    return lines


async def check_has_ended(client: "PrefectClient", job_id: str) -> None:
    """Check that all runs of a job have ended, as far as the server knows.

    Raises:
        ConfigError: a run has not ended.
    """
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterName

    for run in await client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=["federated-job"])),
        flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[job_id])),
    ):
        if run.state is None or not run.state.is_final():
            raise ConfigError(
                f"job {job_id!r} has not ended: its run {run.id} is {run.state.name if run.state else 'new'}. Cancel it first; "
                f"if its machine is gone, run prefect flow-run delete {run.id}"
            )


async def cancel(client: "PrefectClient", job_id: str) -> "UUID":
    """Cancel a job: its sites stop, and it ends as cancelled. Returns the id of its flow run.

    Raises:
        ConfigError: the server has no such job, or the job has ended.
    """
    from fedpool.deployments.following import cancel_run

    run = await find_run(client, job_id)
    if run.state is not None and run.state.is_final():
        raise ConfigError(f"job {job_id!r} has already ended: {run.state.name}")
    await cancel_run(client, run.id)
    return run.id


async def wait_until_over(client: "PrefectClient", run_id: "UUID", timeout_s: float) -> str | None:
    """Wait for a flow run to end; returns its final state's name, or None after `timeout_s`."""
    for pause_s in pauses(timeout_s, _POLL_S):
        state = (await client.read_flow_run(run_id)).state
        if state is not None and state.is_final():
            return state.name or str(state.type)
        await asyncio.sleep(pause_s)
    return None
