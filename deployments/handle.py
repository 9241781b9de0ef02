"""`Run`: a handle on one job, and `Result`: what came of it. Both read the store, which is the
truth about a job.
"""

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
from fedpool.tasks.matrix import site_scores
from fedpool.tasks.record import RoundRecord


class JobStatus(StrEnum):
    """Where a job stands, in Prefect's words."""

    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True)
class Result:
    """What a completed job came to.

    Attributes:
        job_id: of the job.
        path: of the final model, safetensors; fetched to this machine where the store is remote.
        best_path: of the best model by the recipe's key metric; the final one when nothing was
            scored.
        metrics: one dict per global model, from the initial one (index 0) to the last that was
            scored; empty when none was.
        records: of all rounds, evaluations and submissions included.
        num_rounds: training rounds that were committed.
        best_round: the round that the best model is the start of: 0 is the initial model,
            `num_rounds` the final one.
        stopped_by: what stopped the job early, or None.
        evaluation_error: why the final model has no score although sites were asked for one; else
            None.
        endings: site -> how its script failed after its last round, by which the job has not
            failed. Sites elsewhere say so some seconds after the job's end.
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
        """The records as they lie in the store, in `round.json`."""
        return [record.as_json() for record in self.records]

    @cached_property
    def params(self) -> dict[str, Any]:
        """The final model: name -> torch tensor, read when first asked for."""
        return load_arrays(self.path, "torch")

    @cached_property
    def denominators(self) -> dict[str, float]:
        """metric -> what its mean over the sites, of the final model, is over: their weights,
        added up.
        """
        return dict(self._final.denominators) if self._final else {}

    @cached_property
    def site_metrics(self) -> dict[str, dict[str, float | None]]:
        """site -> its metrics of the final model, and under `NUM_STEPS_CURRENT_ROUND` the weight
        that they count with.
        """
        return {entry.site: site_scores(entry) for entry in self._final.accepted} if self._final else {}

    @property
    def _final(self) -> RoundRecord | None:
        """The record of the round that scored the final model; None when none did."""
        return self.records[self.num_rounds] if len(self.records) > self.num_rounds else None

    @cached_property
    def best_params(self) -> dict[str, Any]:
        """The best model: name -> torch tensor, read when first asked for."""
        return load_arrays(self.best_path, "torch")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is, as the store tells: rounds committed, sites that have answered in the
    one under way.
    """

    num_committed: int
    num_answered: int
    last_record: RoundRecord | None


class Run:
    """A handle on a job; safe to use from any thread.

    Args:
        job_id: of the job.
        store: that it writes to.
        work: runs the job to its end; called on a thread of its own, which starts at once.
        cancel: asks the job to end.
        downloads: folder that models of a remote store are fetched to.
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
        self._reading = threading.Lock()  # two threads that both find a record must not both keep it
        self._done = threading.Event()
        # In the caller's context: settings, tags and a surrounding flow of Prefect's are the job's
        # too.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run, work), name=f"fedpool-{job_id}")
        self._thread.start()

    @property
    def path(self) -> str:
        """The job's folder in the store."""
        return self._store.full(self.job_id)

    def get_status(self) -> JobStatus:
        """Where the job stands now."""
        if not self._done.is_set():
            return JobStatus.RUNNING
        result = self._last_word()
        if result:
            return JobStatus(result.status)
        return JobStatus.CANCELLED if isinstance(self._error, JobCancelled) else JobStatus.FAILED

    def get_result(self, timeout: float | None = None) -> Result:
        """Wait for the job and return what it came to.

        Args:
            timeout: seconds to wait; None waits to the end.

        Raises:
            TimeoutError: the job still runs.
            JobFailed: it failed, and the message names site, round and cause; or it was lost, and
                the message says after how many rounds, why, and how to go on.
            JobCancelled: it was cancelled.
            ServerError, StoreError: it could not even begin.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"job {self.job_id} still runs after {timeout} s")
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
            cross_site=self._store.read_json(self._paths.cross_site) if result.cross_site else None,
        )

    def abort(self) -> None:
        """Cancel the job: scripts are killed at once, and the job says that it was cancelled.
        Harmless when it is over.
        """
        if not self._done.is_set():
            self._cancel()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the job's end; returns whether it came within timeout seconds."""
        ended = self._done.wait(timeout)
        if ended:
            self._thread.join()
        return ended

    def raise_if_never_begun(self) -> None:
        """Raise what kept an ended job from even beginning, if anything did."""
        if self._error is not None and not isinstance(self._error, JobError) and self._last_word() is None:
            raise self._error

    def get_progress(self) -> Progress:
        """How far the job is."""
        with self._reading:
            while self._store.exists(self._paths.record(len(self._committed))):
                self._committed.append(RoundRecord.read(self._store, self._paths.record(len(self._committed))))
            number = len(self._committed)
            last = self._committed[-1] if self._committed else None
        return Progress(number, len(self._store.names(self._paths.sites(number))), last)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # kept for get_result(), which raises it in the caller's thread
            self._error = error
        finally:
            self._done.set()

    def _local(self, round: int, records: Sequence[RoundRecord]) -> Path:
        """Where a global model lies on this machine; one in a remote store is fetched first."""
        path = self._paths.global_model(round)
        if self._store.is_local:
            return Path(self._store.full(path))
        target = self._downloads / path
        if not target.exists():
            known = records[round].base if round < len(records) else records[round - 1].next_global
            assert known is not None, "the newest model is the work of the last round"
            with explained(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                # Beside the target, so that it appears there whole.
                with tempfile.TemporaryDirectory(prefix=".fedpool-", dir=target.parent) as folder:
                    self._store.fetch(path, Path(folder), known).replace(target)
        return target

    def _last_word(self) -> JobResult | None:
        """The result of an ended job; None when it left none, or when the store refuses us and
        we know the end.
        """
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
    """The metrics of the models that rounds are the starts of, up to the last that has any."""
    scores = [dict(record.metrics) for record in records]
    while scores and not scores[-1]:
        scores.pop()
    return scores
