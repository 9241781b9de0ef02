"""Shows a job in the Prefect UI: a progress bar, a table per round, and at the end a report.

With the report come a picture per metric, and links to the final and the best model. Artifacts are
written in the background, in order, so no round waits for them. A failed write is a warning in the
job's log, and never fails the job.
"""

import asyncio
import math
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Literal
from urllib.parse import quote
from uuid import UUID

import httpx
from prefect.artifacts import (
    acreate_image_artifact,
    acreate_link_artifact,
    acreate_markdown_artifact,
    acreate_progress_artifact,
    acreate_table_artifact,
    aupdate_progress_artifact,
)
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from fedpool.store import Store
from fedpool.tasks.matrix import Matrix, matrix_metrics, matrix_rows
from fedpool.tasks.observer import Ending, Observer
from fedpool.tasks.record import RoundRecord, of_global_models
from fedpool.tasks.report.curves import curves
from fedpool.tasks.report.heatmap import heat_map
from fedpool.tasks.report.tables import final_report, round_table

_PROGRESS_INTERVAL_S = 1.0


class Reporter(Observer):
    """Writes artifacts in the background: in order, each for the flow run that requested it."""

    __slots__ = ("_last", "_moved", "_progress", "_shown", "_wanted")

    def __init__(self) -> None:
        self._last: asyncio.Task[None] | None = None
        self._progress: UUID | None = None
        self._shown: float | None = None
        self._moved = -math.inf
        self._wanted = 0.0

    def progressed(self, percent: float) -> None:
        """See `Observer.progressed`: creates or moves the job's progress bar."""
        self._wanted = percent
        self._later(self._move())

    def committed(self, record: RoundRecord) -> None:
        """See `Observer.committed`: writes the table of the round."""
        self._later(
            acreate_table_artifact(
                round_table(record), key="round-table", description=f"round {record.round}: {record.task}"
            )
        )

    def ended(self, ending: Ending) -> None:
        """See `Observer.ended`: writes the report, curves, cross-site scores, links to models."""
        name, result, records = ending.name, ending.result, ending.records
        pictures = curves(of_global_models(records), first=result.key_metric)
        if ending.matrix is not None:
            self._across_sites(name, ending.matrix, first=result.key_metric, mode=result.key_metric_mode)
        markdown = final_report(
            name, result, records, pictures=[picture.key for picture in pictures], findings=ending.findings
        )
        self._later(
            acreate_markdown_artifact(markdown, key="report", description=f"report of {name}"),
            *(
                acreate_image_artifact(picture.uri, key=picture.key, description=f"{picture.metric} over rounds")
                for picture in pictures
            ),
            *(
                acreate_link_artifact(
                    link_to(ending.store, model.path),
                    link_text=model.path,
                    key=f"{which}-model",
                    description=f"{which} model of {name}: the start of round {model.round}",
                )
                for which, model in (("final", result.final), ("best", result.best))
            ),
        )

    def _across_sites(self, name: str, matrix: Matrix, *, first: str, mode: Literal["max", "min"]) -> None:
        """A table and a picture of the main metric: `first`, or the first one by name."""
        for metric in matrix_metrics(matrix, first=first)[:1]:
            header, rows = matrix_rows(matrix, metric)
            about = f"{metric} of every model (columns) at every site (rows) of {name}"
            table = [dict(zip(header, row, strict=True)) for row in rows]
            self._later(acreate_table_artifact(table, key="cross-site", description=about))
            if (picture := heat_map(matrix, metric, mode)) is not None:
                self._later(acreate_image_artifact(picture.uri, key=picture.key, description=about))

    async def finish(self) -> None:
        """Wait until everything is written."""
        if self._last is not None:
            await self._last

    def _later(self, *writes: Coroutine[Any, Any, Any]) -> None:
        self._last = asyncio.create_task(_write_after(self._last, writes))

    async def _move(self) -> None:
        now = time.monotonic()
        if self._wanted == self._shown or (self._wanted < 100 and now - self._moved < _PROGRESS_INTERVAL_S):
            return  # an earlier write showed this value, or is too recent for anyone to see the difference
        self._moved = now
        self._shown = self._wanted
        if self._progress is None:
            created = await acreate_progress_artifact(self._shown, key="progress", description="rounds of the job")
            self._progress = created if isinstance(created, UUID) else None
        else:
            await aupdate_progress_artifact(self._progress, self._shown)


def link_to(store: Store, path: str) -> str:
    """The URL of a full path in a store: `file://` if it is local, else the store's protocol."""
    return quote(store.fs.unstrip_protocol(path), safe="/:")


async def _write_after(previous: asyncio.Task[None] | None, writes: Sequence[Coroutine[Any, Any, Any]]) -> None:
    if previous is not None:
        await previous
    for outcome in await asyncio.gather(*writes, return_exceptions=True):
        if isinstance(outcome, PrefectException | httpx.HTTPError | OSError | ValueError):
            get_run_logger().warning("an artifact could not be written: %s", outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
