"""`Observer`: how a job reports to the Prefect UI (`fedpool.tasks.report.prefect_ui`) and trackers.

An observer's methods are called on the job's event loop and return at once. Slow work runs in the
background, in the order of the calls. An observer never fails a job: its own failures become
warnings in the job's log.
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
"""Returns the values that a script has logged. May read them from the store, so call it in the
background. Raises `FedpoolError`.
"""


@dataclass(frozen=True, slots=True)
class Beginning:
    """A job that starts or is resumed.

    Attributes:
        name: of the recipe.
        fields: of the recipe, as in `job.json`.
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
        matrix: the cross-site scores, if any.
        findings: facts that the tables don't show, see `fedpool.tasks.findings`.
    """

    name: str
    result: JobResult
    records: Sequence[RoundRecord]
    store: Store
    matrix: Matrix | None = None
    findings: Sequence[str] = ()


@runtime_checkable  # Prefect checks the types of a flow's parameters
class Observer(Protocol):
    """Follows a job. Subclasses define only the methods that they need."""

    wants_scalars: ClassVar[bool] = False
    """Whether `logged` is used. If not, remote sites needn't send what their scripts log."""

    def begun(self, beginning: Beginning) -> None:
        """The job starts or is resumed. Called first, from its flow run."""
        return

    def logged(self, site: str, round: int, read: ReadScalars) -> None:
        """A site has answered, and its script has logged scalars. Its update may be rejected."""
        return

    def committed(self, record: RoundRecord) -> None:
        """A round is committed. Called from its flow run."""
        return

    def progressed(self, percent: float) -> None:
        """This much of the job is done."""
        return

    def ended(self, ending: Ending) -> None:
        """The job has ended, and its result is in the store."""
        return

    def interrupted(self, ending: Ending) -> None:
        """Like `ended`, but this process is about to end too, so `finish` is not called."""
        return

    async def finish(self) -> None:
        """Wait for a limited time until everything reported so far is done."""
        return


def tell_logged(
    observer: Observer, store: Store, site: str, round: int, attempt: int, job_id: str, delivery: Delivery
) -> None:
    """Report the values that a site's script has logged for a delivery, if any."""
    scalars, named = delivery.scalars, delivery.manifest.scalars
    if scalars:
        observer.logged(site, round, lambda: scalars)
    elif named is not None:
        observer.logged(
            site, round, partial(read_scalars, store, JobPaths(job_id).scalars(round, site, attempt), named)
        )


class Observers(Observer):
    """Several observers as one."""

    __slots__ = ("_each",)

    def __init__(self, *each: Observer) -> None:
        self._each = each

    @property
    def wants_scalars(self) -> bool:  # type: ignore[override]  # a property here, a class variable in the others
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
