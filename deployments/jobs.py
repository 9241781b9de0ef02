"""The jobs of a store, as the terminal shows them; and the runs of a job, as the Prefect server
has them.
"""

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedpool.deployments.fate import Server, fates
from fedpool.deployments.run import JobStatus
from fedpool.errors import ConfigError, IntegrityError
from fedpool.flows.recipes import class_name
from fedpool.paths import JobPaths
from fedpool.patience import pauses
from fedpool.store import Store
from fedpool.tasks.job_record import JobRecord, JobResult
from fedpool.tasks.record import RoundRecord, num_trained, of_global_models, stored_records
from fedpool.tasks.retention import KeepUpdates, drop_updates, outdated

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

_PAGE = 200
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class JobSummary:
    """One job of a store.

    Attributes:
        job_id: its folder.
        recipe: class of its recipe.
        status: as its result says; without one RUNNING, or FAILED when it was lost; None when
            nobody can tell.
        ended: whether it has a result.
        num_committed: rounds that are committed.
        num_rounds: training rounds that the recipe asks for.
        sites: names.
        metrics: of the newest global model that was scored.
        unreadable: why it cannot be read, if it cannot: it is damaged, or of another version.
    """

    job_id: str
    recipe: str
    status: JobStatus | None
    num_committed: int
    num_rounds: int
    sites: list[str]
    metrics: dict[str, float]
    ended: bool = True
    unreadable: str | None = None


def list_jobs(store: Store, server: Server | None = None) -> list[JobSummary]:
    """The jobs of a store, newest first; what was staged as a template of a deployment is not one.

    Args:
        server: the Prefect server to ask for jobs that left no result, if any.
    """
    found: list[JobSummary] = []
    simulated: dict[str, bool] = {}
    for name in store.names(""):
        if not name.startswith(".") and store.exists(f"{name}/job.json"):
            try:
                job = JobRecord.read(store, f"{name}/job.json")
                if not job.template:
                    simulated[name] = job.simulated
                    found.append(_summary(store, name, job))
            except IntegrityError as error:  # one of many: the others are to be seen all the same
                found.append(JobSummary(name, "?", None, 0, 0, [], {}, unreadable=str(error)))
    lost = fates(store, [(job.job_id, simulated[job.job_id]) for job in found if not job.ended], server)
    found = [job if job.ended else replace(job, status=lost.get(job.job_id)) for job in found]
    # The time is in the id, after the recipe's name.
    return sorted(found, key=lambda job: job.job_id.rsplit("-", 3)[1:], reverse=True)


def check_is_there(store: Store, job_id: str) -> None:
    """Check that there is such a job.

    Raises:
        ConfigError: there is none; says which there are.
    """
    if not store.exists(JobPaths(job_id).job):
        raise _unknown(store, job_id)


def read_job(
    store: Store, job_id: str, server: Server | None = None
) -> tuple[JobSummary, list[RoundRecord], JobResult | None]:
    """A job: its summary, its rounds' records, and its result if it has ended.

    Args:
        server: see `list_jobs`.

    Raises:
        ConfigError: there is no such job.
    """
    paths = JobPaths(job_id)
    try:
        job = JobRecord.read(store, paths.job)
    except FileNotFoundError:
        raise _unknown(store, job_id) from None
    result = _result(store, paths)
    summary = _summary(store, job_id, job)
    if result is None:
        fate = fates(store, [(job_id, job.simulated)], server).get(job_id)
        summary = replace(summary, status=fate)
    return summary, list(stored_records(store, job_id)), result


def _unknown(store: Store, job_id: str) -> ConfigError:
    known = ", ".join(job.job_id for job in list_jobs(store)[:5]) or "none"
    return ConfigError(f"there is no job {job_id!r} in {store.url}: the newest are {known}")


def _summary(store: Store, job_id: str, job: JobRecord) -> JobSummary:
    paths = JobPaths(job_id)
    result = _result(store, paths)
    records = list(stored_records(store, job_id))
    return JobSummary(
        job_id=job_id,
        recipe=class_name(job.kind),
        status=JobStatus(result.status) if result else None,
        num_committed=num_trained(records),
        num_rounds=job.fields.get("num_rounds", 0),
        sites=list(job.sites),
        ended=result is not None,
        metrics=next((record.metrics for record in reversed(of_global_models(records)) if record.metrics), {}),
    )


def _result(store: Store, paths: JobPaths) -> JobResult | None:
    return JobResult.read(store, paths.result) if store.exists(paths.result) else None


async def find_run(client: "PrefectClient", job_id: str) -> "FlowRun":
    """The flow run of a job.

    Raises:
        ConfigError: the server knows none.
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
            f"the Prefect server at {client.api_url} knows no run of job {job_id!r}. `fedpool job show {job_id}` says what "
            f"became of it, `fedpool job resume {job_id}` goes on with it"
        )
    return runs[0]


async def read_logs(client: "PrefectClient", job_id: str, site: str | None) -> list[tuple[str, str]]:
    """What a job's runs have logged: (run's name, line), by time.

    Args:
        site: only what this site's runs have logged, which is what its script printed.

    Raises:
        ConfigError: the server knows no such job.
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


def prune(store: Store, job_id: str, keep: KeepUpdates) -> int:
    """Remove the accepted updates of a job that has ended; returns how many bytes that freed.

    Raises:
        ConfigError: there is no such job, or it has not ended.
    """
    _, records, result = read_job(store, job_id)
    if result is None:
        raise ConfigError(f"job {job_id!r} has not ended: its updates may still be needed")
    paths = JobPaths(job_id)
    if not store.exists(paths.pruned):  # first: whoever looks meanwhile knows why updates are missing
        store.write_json(paths.pruned, {"job_id": job_id})
    return sum(drop_updates(store, job_id, record) for record in outdated(records, keep))


async def check_has_ended(client: "PrefectClient", job_id: str) -> None:
    """Check that no run of a job is under way, as far as the server knows.

    Raises:
        ConfigError: one is.
    """
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterName

    for run in await client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=["federated-job"])),
        flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[job_id])),
    ):
        if run.state is None or not run.state.is_final():
            raise ConfigError(
                f"job {job_id!r} is under way: its run {run.id} is {run.state.name if run.state else 'new'}. Cancel it first; "
                f"if the machine that ran it is gone: prefect flow-run delete {run.id}"
            )


async def cancel(client: "PrefectClient", job_id: str) -> "UUID":
    """Ask for a job to be cancelled: its sites stop, and it says so. Returns the id of its flow
    run.

    Raises:
        ConfigError: the server knows no such job, or it has ended.
    """
    from fedpool.deployments.following import cancel_run

    run = await find_run(client, job_id)
    if run.state is not None and run.state.is_final():
        raise ConfigError(f"job {job_id!r} has ended already: {run.state.name}")
    await cancel_run(client, run.id)
    return run.id


async def wait_until_over(client: "PrefectClient", run_id: "UUID", timeout_s: float) -> str | None:
    """Wait for a flow run to end; returns the name of the state it ended in, None when it has
    not ended in that time.
    """
    for pause_s in pauses(timeout_s, _POLL_S):
        state = (await client.read_flow_run(run_id)).state
        if state is not None and state.is_final():
            return state.name or str(state.type)
        await asyncio.sleep(pause_s)
    return None
