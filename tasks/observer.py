"""`Observer`: what a job tells those who watch it. The Prefect UI is one
(`fedpool.tasks.report.prefect_ui`); trackers are others.

An observer is told from the job's event loop, and returns at once: what takes time it does in the
background, in the order in which it was told. It never fails a job: what it cannot do is a warning
in the job's log.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

from fedpool.paths import JobPaths
from fedpool.sites.scalars import Scalar, read_scalars
from fedpool.sites.site_round import Delivery
from fedpool.store import Store
from fedpool.tasks.job_record import JobResult
from fedpool.tasks.matrix import Matrix
from fedpool.tasks.record import RoundRecord

ReadScalars = Callable[[], Sequence[Scalar]]
"""Gives what a script has logged. It may have to be read from the store: call it in the
background. Raises `FedpoolError`.
"""


@dataclass(frozen=True, slots=True)
class Beginning:
    """A job that begins, or goes on.

    Attributes:
        name: of the recipe.
        fields: of the recipe, as `job.json` has them.
    """

    job_id: str
    name: str
    store: Store
    sites: Sequence[str]
    fields: Mapping[str, Any]
    key_metric: str


@dataclass(frozen=True, slots=True)
class Ending:
    """A job that has ended.

    Attributes:
        name: of the recipe.
        matrix: the scores across sites, where there are any.
        findings: what the tables do not show; see `fedpool.tasks.findings`.
    """

    name: str
    result: JobResult
    records: Sequence[RoundRecord]
    store: Store
    matrix: Matrix | None = None
    findings: Sequence[str] = ()


@runtime_checkable  # Prefect asks for the type of a flow's parameters
class Observer(Protocol):
    """Someone who watches a job; it defines what concerns it."""

    wants_scalars: ClassVar[bool] = False
    """Whether `logged` is of use: else sites elsewhere need not send what their scripts log."""

    def begun(self, beginning: Beginning) -> None:
        """The job begins, or goes on; told first, from its flow run."""
        return

    def logged(self, site: str, round: int, read: ReadScalars) -> None:
        """A site has answered, and its script had logged scalars on the way; whatever becomes of
        its update.
        """
        return

    def committed(self, record: RoundRecord) -> None:
        """A round is committed; told from its flow run."""
        return

    def progressed(self, percent: float) -> None:
        """So much of the job is done."""
        return

    def ended(self, ending: Ending) -> None:
        """The job has ended, and its result is in the store."""
        return

    def interrupted(self, ending: Ending) -> None:
        """Likewise, and this process is about to end, too: nobody waits for `finish`."""
        return

    async def finish(self) -> None:
        """Wait, for a time that is bounded, until all that was told is done."""
        return


def tell_logged(
    observer: Observer, store: Store, site: str, round: int, attempt: int, job_id: str, delivery: Delivery
) -> None:
    """Tell what a site's script has logged on the way to what it delivered, if anything."""
    scalars, named = delivery.scalars, delivery.manifest.scalars
    if scalars:
        observer.logged(site, round, lambda: scalars)
    elif named is not None:
        observer.logged(
            site, round, partial(read_scalars, store, JobPaths(job_id).scalars(round, site, attempt), named)
        )


class Observers(Observer):
    """Several observers, as one."""

    __slots__ = ("_each",)

    def __init__(self, *each: Observer) -> None:
        self._each = each

    @property
    def wants_scalars(self) -> bool:  # type: ignore[override]  # each of the others is of one mind
        return any(observer.wants_scalars for observer in self._each)

    def begun(self, beginning: Beginning) -> None:
        for observer in self._each:
            observer.begun(beginning)

    def logged(self, site: str, round: int, read: ReadScalars) -> None:
        for observer in self._each:
            observer.logged(site, round, read)

    def committed(self, record: RoundRecord) -> None:
        for observer in self._each:
            observer.committed(record)

    def progressed(self, percent: float) -> None:
        for observer in self._each:
            observer.progressed(percent)

    def ended(self, ending: Ending) -> None:
        for observer in self._each:
            observer.ended(ending)

    def interrupted(self, ending: Ending) -> None:
        for observer in self._each:
            observer.interrupted(ending)

    async def finish(self) -> None:
        for observer in self._each:
            await observer.finish()
