"""`Run`, a handle on a job, and `Result`, its outcome. Both read the store, which has the truth."""

import contextvars
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpool.arrays import load_arrays
from fedpool.deployments.endings import read_endings
from fedpool.errors import JobCancelled, JobError, JobFailed, StoreError
from fedpool.paths import JobPaths
from fedpool.refusals import explained
from fedpool.store import Store
from fedpool.tasks.job_record import JobResult
from fedpool.tasks.matrix import read_matrix, site_scores
from fedpool.tasks.record import RoundRecord


class JobStatus(StrEnum):
    """A job's status, with Prefect's names."""

    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True)
class Result:
    """The outcome of a completed job.

    Attributes:
        job_id: the job's id.
        path: path of the final model (safetensors); downloaded if the store is remote.
        best_path: path of the best model by the recipe's key metric; the final model if none was
            scored.
        metrics: one dict per global model, from the initial one (index 0) to the last that was
            scored; empty if none was.
        records: records of all rounds, including evaluations and submissions.
        num_rounds: number of committed training rounds.
        best_round: the round that starts from the best model: 0 means the initial model,
            `num_rounds` the final one.
        stopped_by: the reason why the job stopped early, or None.
        evaluation_error: why the final model has no score although sites were asked for one, or
            None.
        endings: site -> how its script failed after its last round, which does not fail the job.
            Sites elsewhere report this some seconds after the end of the job.
        cross_site: data site -> owner of a model -> metrics and their weight; None without
            `cross_site_eval`.
    """

    job_id: str
    path: Path
    best_path: Path
    metrics: list[dict[str, float]]
    records: list[RoundRecord] = field(repr=False)
    num_rounds: int
    best_round: int
    stopped_by: str | None
    evaluation_error: str | None = None
    endings: dict[str, str] = field(default_factory=dict)
    cross_site: dict[str, dict[str, dict[str, float | None]]] | None = None

    @cached_property
    def rounds(self) -> list[dict[str, Any]]:
        """The records as stored in `round.json`."""
        return [record.as_json() for record in self.records]

    @cached_property
    def params(self) -> dict[str, Any]:
        """The final model: name -> torch tensor, read on first access."""
        return load_arrays(self.path, "torch")

    @cached_property
    def denominators(self) -> dict[str, float]:
        """metric -> the sum of the sites' weights in its mean, for the final model."""
        return dict(self._final.denominators) if self._final else {}

    @cached_property
    def site_metrics(self) -> dict[str, dict[str, float | None]]:
        """site -> metrics of the final model, and their weight as `NUM_STEPS_CURRENT_ROUND`."""
        return {entry.site: site_scores(entry) for entry in self._final.accepted} if self._final else {}

    @property
    def _final(self) -> RoundRecord | None:
        """The record of the round that scored the final model, or None."""
        return self.records[self.num_rounds] if len(self.records) > self.num_rounds else None

    @cached_property
    def best_params(self) -> dict[str, Any]:
        """The best model: name -> torch tensor, read on first access."""
        return load_arrays(self.best_path, "torch")


@dataclass(frozen=True, slots=True)
class Progress:
    """A job's progress: committed rounds, and sites that have answered in the current one."""

    num_committed: int
    num_answered: int
    last_record: RoundRecord | None


class Run:
    """A handle on a job. Thread-safe.

    Args:
        job_id: the job's id.
        store: the store that the job writes to.
        work: runs the job to its end; called at once, on its own thread.
        cancel: asks the job to end.
        downloads: folder for models that are downloaded from a remote store.
    """

    def __init__(
        self,
        job_id: str,
        store: Store,
        *,
        work: Callable[[], None],
        cancel: Callable[[], None],
        downloads: Path = Path("fedpool-runs"),
    ) -> None:
        self.job_id = job_id
        self._store = store
        self._paths = JobPaths(job_id)
        self._cancel = cancel
        self._downloads = downloads.absolute()
        self._error: BaseException | None = None
        self._committed: list[RoundRecord] = []
        self._reading = threading.Lock()  # only one of two threads that find a record may keep it
        self._done = threading.Event()
        # In the caller's context, so that the job has its settings and tags, and any surrounding
        # Prefect flow.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run, work), name=f"fedpool-{job_id}")
        self._thread.start()

    @property
    def path(self) -> str:
        """The job's folder in the store."""
        return self._store.full(self.job_id)

    def get_status(self) -> JobStatus:
        """The job's current status."""
        if not self._done.is_set():
            return JobStatus.RUNNING
        result = self._last_word()
        if result:
            return JobStatus(result.status)
        return JobStatus.CANCELLED if isinstance(self._error, JobCancelled) else JobStatus.FAILED

    def get_result(self, timeout: float | None = None) -> Result:
        """Wait for the job, and return its outcome.

        Args:
            timeout: seconds to wait; None: until the end.

        Raises:
            TimeoutError: the job is still running.
            JobFailed: the job failed, and the message names site, round and cause; or it was lost,
                and the message says after how many rounds, why, and how to continue.
            JobCancelled: the job was cancelled.
            ServerError, StoreError: the job could not begin.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"job {self.job_id} is still running after {timeout} s")
        result = self._last_word()
        if result is None:
            if self._error is not None:
                raise self._error
            raise JobFailed(f"job {self.job_id} ended without a result")
        if result.status == JobStatus.FAILED:
            raise JobFailed(f"job {self.job_id} failed: {result.error}")
        if result.status == JobStatus.CANCELLED:
            raise JobCancelled(f"job {self.job_id} was cancelled after {result.num_rounds} rounds")
        records = self._read_records(result.num_records)
        return Result(
            job_id=self.job_id,
            path=self._local(result.final.round, records),
            best_path=self._local(result.best.round, records),
            metrics=_scores(records[: result.num_rounds + 1]),
            records=records,
            num_rounds=result.num_rounds,
            best_round=result.best.round,
            stopped_by=result.stopped_by,
            evaluation_error=result.evaluation_error,
            endings=read_endings(self._store, self.job_id, result, records),
            cross_site=read_matrix(self._store, self._paths.cross_site) if result.cross_site else None,
        )

    def abort(self) -> None:
        """Cancel the job: scripts are killed at once, and it ends as cancelled. Idempotent."""
        if not self._done.is_set():
            self._cancel()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the job to end; returns whether it ended within `timeout` seconds."""
        ended = self._done.wait(timeout)
        if ended:
            self._thread.join()
        return ended

    def raise_if_never_begun(self) -> None:
        """Raise the error that kept the job from beginning, if any."""
        if self._error is not None and not isinstance(self._error, JobError) and self._last_word() is None:
            raise self._error

    def get_progress(self) -> Progress:
        """The job's progress."""
        with self._reading:
            while self._store.exists(self._paths.record(len(self._committed))):
                self._committed.append(RoundRecord.read(self._store, self._paths.record(len(self._committed))))
            number = len(self._committed)
            last = self._committed[-1] if self._committed else None
        return Progress(number, len(self._store.names(self._paths.sites(number))), last)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # get_result() raises it in the caller's thread
            self._error = error
        finally:
            self._done.set()

    def _local(self, round: int, records: Sequence[RoundRecord]) -> Path:
        """Path of a global model on this machine; downloads it from a remote store."""
        path = self._paths.global_model(round)
        if self._store.is_local:
            return Path(self._store.full(path))
        target = self._downloads / path
        if not target.exists():
            known = records[round].base if round < len(records) else records[round - 1].next_global
            assert known is not None, "the newest model is the work of the last round"
            with explained(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                # In the same folder, so that the complete file appears at once.
                with tempfile.TemporaryDirectory(prefix=".fedpool-", dir=target.parent) as folder:
                    self._store.fetch(path, Path(folder), known).replace(target)
        return target

    def _last_word(self) -> JobResult | None:
        """The result of an ended job; None if it left none or the end is known otherwise."""
        try:
            return self._read_result()
        except StoreError:
            if self._error is None:
                raise
            return None

    def _read_result(self) -> JobResult | None:
        return JobResult.read(self._store, self._paths.result) if self._store.exists(self._paths.result) else None

    def _read_records(self, count: int) -> list[RoundRecord]:
        return [RoundRecord.read(self._store, self._paths.record(number)) for number in range(count)]


def _scores(records: Sequence[RoundRecord]) -> list[dict[str, float]]:
    """The metrics of the rounds' starting models, up to the last that has any."""
    scores = [dict(record.metrics) for record in records]
    while scores and not scores[-1]:
        scores.pop()
    return scores
