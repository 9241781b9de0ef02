"""The output of `fedpool job list`, `show`, `verify` and `replay` for people."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fedpool.deployments.endings import read_endings, tell_endings
from fedpool.deployments.handle import JobStatus
from fedpool.deployments.progress import cross_site_table, print_findings
from fedpool.deployments.stored_jobs import JobSummary
from fedpool.deployments.terminal import open_console
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.findings import findings
from fedpool.tasks.job_record import JobRecord, JobResult
from fedpool.tasks.key_metric import MetricRules
from fedpool.tasks.matrix import matrix_metrics, read_matrix
from fedpool.tasks.record import RoundRecord
from fedpool.tasks.report.tables import report_rows, untold

if TYPE_CHECKING:  # they load torch
    from fedpool.flows.replay import Replayed
    from fedpool.flows.verify import Verified

_OTHER_COLUMNS = 48
"""Width that the columns after the job's id need to be readable; narrower terminals wrap the
lines.
"""


def print_jobs(found: Sequence[JobSummary]) -> None:
    """Print a line for each job; needs at least one."""
    table = Table()
    # The next command needs the whole id, however narrow the terminal is. The other columns wrap.
    longest = max(len(entry.job_id) for entry in found)
    table.add_column("job", no_wrap=True, min_width=longest)
    for header in ("recipe", "status", "rounds", "sites", "metrics"):
        table.add_column(header, overflow="fold")
    for entry in found:
        rounds = f"{entry.num_committed}/{entry.num_rounds}"
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in entry.metrics.items())
        table.add_row(entry.job_id, entry.recipe, _status(entry), rounds, str(len(entry.sites)), metrics)
    console = open_console()
    console.width = max(console.width, longest + _OTHER_COLUMNS)
    console.print(table)


def print_job(
    store: Store, summary: JobSummary, job: JobRecord, records: Sequence[RoundRecord], result: JobResult | None
) -> None:
    """Print a job's rounds and findings, and the locations of its models.

    Args:
        store: with the job.
        summary: of the job.
        job: its `job.json`.
        records: of its rounds.
        result: None if the job has none; it may still be running.
    """
    console = open_console()
    console.print(f"{summary.job_id}: {_status(summary)}", highlight=False)
    console.print(_rounds(records))
    if result is not None and result.error:
        console.print(result.error, style="red", markup=False, highlight=False, soft_wrap=True)
    told = findings(MetricRules.stored(job), job.fields.get("aggregation_weights", {}), records)
    print_findings(untold(told, result.error if result else None), console)
    has_ended_badly = summary.status in (JobStatus.FAILED, JobStatus.CANCELLED)
    if result is None and has_ended_badly:
        print("it has no result: its process was lost before it could write one")
    if result is None and summary.status is None:
        print("it has no result, and no reachable Prefect server knows it: it is still running, or was lost")
    if has_ended_badly:
        console.print(f"resume it: fedpool job resume {summary.job_id}", highlight=False, soft_wrap=True)
    if result is not None:
        _print_result(store, summary.job_id, records, result, console)


def print_verified(job_id: str, found: "Verified") -> None:
    """Print the result of a verification."""
    print(
        f"{job_id}: {found.num_rounds} rounds and {found.num_updates} updates verified: "
        "every hash matches, and every aggregate is the same, to the byte"
    )
    if found.num_pruned:
        print(f"{found.num_pruned} updates were not kept, so the aggregates of their rounds could not be recomputed")
    if found.status is None:
        print("it has no result yet: it is still running, or its coordinator was lost")


def print_replayed(job_id: str, found: "Replayed") -> None:
    """Print the result of a replay."""
    print(f"round {found.round} of {job_id}, from {', '.join(found.sites)}: sha256 {found.sha256}")
    print(
        f"the round moved the model by {found.moved:.6g} (L2); this model is {found.distance:.6g} from the committed one"
    )


def _rounds(records: Sequence[RoundRecord]) -> Table:
    header, rows = report_rows(records)
    table = Table()
    for name in header:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _print_result(
    store: Store, job_id: str, records: Sequence[RoundRecord], result: JobResult, console: Console
) -> None:
    paths = JobPaths(job_id)
    if result.evaluation_error:
        print_findings(result.evaluation_error.splitlines()[:1], console)
    print_findings(tell_endings(read_endings(store, job_id, result, records)), console)
    for which, model in (("final", result.final), ("best", result.best)):
        where = store.address(paths.global_model(model.round))
        console.print(f"{which} model: {where}", highlight=False, soft_wrap=True)
    if result.cross_site:
        matrix = read_matrix(store, paths.cross_site)
        for metric in matrix_metrics(matrix, first=result.key_metric)[:1]:
            console.print(cross_site_table(matrix, metric))


def _status(summary: JobSummary) -> str:
    return "unreadable" if summary.unreadable else summary.status or "unknown"
