"""Summaries of the jobs in a store."""

from dataclasses import dataclass, replace

from fedpool.deployments.fate import Server, fates
from fedpool.deployments.handle import JobStatus
from fedpool.errors import ConfigError, IntegrityError
from fedpool.flows.recipes import class_name
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.job_record import JobRecord, JobResult
from fedpool.tasks.record import RoundRecord, num_trained, of_global_models, stored_records
from fedpool.tasks.retention import KeepUpdates, drop_updates, outdated


@dataclass(frozen=True, slots=True)
class JobSummary:
    """A job in a store.

    Attributes:
        job_id: its folder.
        recipe: class of its recipe.
        status: from its result; without one RUNNING, or FAILED if it was lost; None if unknown.
        ended: whether it has a result.
        num_committed: number of committed rounds.
        num_rounds: number of training rounds in the recipe.
        sites: names of its sites.
        metrics: metrics of the newest global model that was scored.
        unreadable: why it cannot be read, because it is damaged or of another version; else None.
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
    """The jobs in a store, newest first, without the templates of deployments.

    Args:
        server: the Prefect server to ask about jobs without a result, if any.
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
            except IntegrityError as error:  # one bad job must not hide the others
                found.append(JobSummary(name, "?", None, 0, 0, [], {}, unreadable=str(error)))
    lost = fates(store, [(job.job_id, simulated[job.job_id]) for job in found if not job.ended], server)
    found = [job if job.ended else replace(job, status=lost.get(job.job_id)) for job in found]
    # The id has the time after the recipe's name.
    return sorted(found, key=lambda job: job.job_id.rsplit("-", 3)[1:], reverse=True)


def check_is_there(store: Store, job_id: str) -> None:
    """Check that a job exists.

    Raises:
        ConfigError: there is no such job; the message lists the newest ones.
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


def prune(store: Store, job_id: str, keep: KeepUpdates) -> int:
    """Remove the accepted updates of an ended job; returns the number of bytes freed.

    Raises:
        ConfigError: there is no such job, or it has not ended.
    """
    _, records, result = read_job(store, job_id)
    if result is None:
        raise ConfigError(f"job {job_id!r} has not ended: its updates may still be needed")
    paths = JobPaths(job_id)
    if not store.exists(paths.pruned):  # first, so that readers know why updates are missing
        store.write_json(paths.pruned, {"job_id": job_id})
    return sum(drop_updates(store, job_id, record) for record in outdated(records, keep))
