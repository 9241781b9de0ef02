"""What a person sees of a job in the Prefect UI: a progress bar, a table per round, a report at the end.

Artifacts are written in the background, in order, so that no round waits for them; a report that cannot be written is a
warning in the job's log and never fails the job.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import acreate_markdown_artifact, acreate_progress_artifact, acreate_table_artifact, aupdate_progress_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from fedpool.tasks.record import Record


def metric_names(records: Sequence[Record]) -> list[str]:
    """Names of all metrics and logged scalars of some rounds, sorted."""
    return sorted({name for record in records for name in (*record["metrics"], *record["logged"])})


def round_table(record: Record) -> list[dict[str, Any]]:
    """One row per site: site, state, examples (its weight), metrics and logged scalars, seconds, bytes."""
    names = metric_names([record])
    rows: list[dict[str, Any]] = []
    for entry in record["accepted"]:
        values = {**entry["logged"], **entry["metrics"]}
        shown = {name: "" if values.get(name) is None else f"{values[name]:.4f}" for name in names}
        rows.append(
            {"site": entry["site"], "state": "accepted", "examples": f"{entry['weight']:g}", **shown}
            | {"seconds": f"{entry['seconds']:.2f}", "bytes": str(entry["size"])}
        )
    for state, why in (("rejected", "reason"), ("failed", "cause")):
        rows += [{"site": entry["site"], "state": f"{state}: {entry[why].splitlines()[0]}"} for entry in record[state]]
    return sorted(rows, key=lambda row: str(row["site"]))


def report_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Header and one row per round: round, task, accepted of asked, metrics, seconds."""
    names = metric_names(records)
    header = ["round", "task", "sites", *names, "seconds"]
    rows = []
    for record in records:
        values = {**record["logged"], **record["metrics"]}
        rows.append(
            [
                str(record["round"]),
                record["task"],
                f"{len(record['accepted'])}/{len(record['sites'])}",
                *(f"{values[name]:.4f}" if name in values else "" for name in names),
                f"{record['timings']['round_s']:.2f}",
            ]
        )
    return header, rows


def final_report(name: str, result: dict[str, Any], records: Sequence[Record]) -> str:
    """The job in markdown: outcome, final and best model, the per-round table."""
    lines = [f"# {name}: {result['status'].lower()}", ""]
    if result["error"]:
        lines += ["```", result["error"], "```", ""]
    for which in ("final", "best"):
        model = result[which]
        scores = ", ".join(f"{key} {value:.4f}" for key, value in model["metrics"].items()) or "not scored"
        lines.append(f"- **{which} model**: the start of round {model['round']}, {scores}: `{model['path']}`")
    if result["stopped_by"]:
        lines.append(f"- stopped early: {result['stopped_by']}")
    header, rows = report_rows(records)
    lines += ["", "The metrics of a round are the score of the model that it started from.", ""]
    lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


class Reporter:
    """Writes artifacts behind the job's back: in order, each for the flow run in whose context `later` was called."""

    __slots__ = ("_last", "_progress")

    def __init__(self) -> None:
        self._last: asyncio.Task[None] | None = None
        self._progress: UUID | None = None

    def progress(self, percent: float) -> None:
        """Show or move the job's progress bar."""
        self._later(self._move(percent))

    def table(self, record: Record) -> None:
        """The table of a round."""
        self._later(
            acreate_table_artifact(
                round_table(record), key="round-table", description=f"round {record['round']}: {record['task']}"
            )
        )

    def report(self, markdown: str) -> None:
        """The report at the end."""
        self._later(acreate_markdown_artifact(markdown, key="report", description="report of the job"))

    async def finish(self) -> None:
        """Wait for everything to be written."""
        if self._last is not None:
            await self._last

    def _later(self, write: Coroutine[Any, Any, Any]) -> None:
        self._last = asyncio.create_task(_write_after(self._last, write))

    async def _move(self, percent: float) -> None:
        if self._progress is None:
            created = await acreate_progress_artifact(percent, key="progress", description="rounds of the job")
            self._progress = created if isinstance(created, UUID) else None
        else:
            await aupdate_progress_artifact(self._progress, percent)


async def _write_after(previous: asyncio.Task[None] | None, write: Coroutine[Any, Any, Any]) -> None:
    if previous is not None:
        await previous
    try:
        await write
    except (PrefectException, httpx.HTTPError, OSError) as error:
        get_run_logger().warning("an artifact could not be written: %s", error)
