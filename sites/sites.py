"""`Sites`: how a job reaches its sites.

In a simulation they are `LocalSites`, elsewhere `fedpool.tasks.dispatch.PoolSites`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from fedpool.messages import ClientJob, SiteAssignment
from fedpool.sites.output import LogLine
from fedpool.sites.site_round import Delivery
from fedpool.store import Store


@dataclass(frozen=True, slots=True)
class Traits:
    """What the coordinator has to know about sites.

    Attributes:
        simulated: sites are processes on the coordinator's machine, and end with it.
        have_runs: a site's part of a round has its own Prefect run, so the round needs no task for
            it.
        outlive: a site goes on with its work if the coordinator is lost.
        come_back: a lost site may come back, so the round may wait for it.
    """

    simulated: bool
    have_runs: bool
    outlive: bool
    come_back: bool


SIMULATED = Traits(simulated=True, have_runs=False, outlive=False, come_back=False)
ELSEWHERE = Traits(simulated=False, have_runs=True, outlive=True, come_back=True)


@runtime_checkable  # Prefect checks the types of a flow's parameters
class Sites(Protocol):
    """How a job reaches its sites. This is all that the coordinator knows about them."""

    names: tuple[str, ...]
    num_slots: int
    traits: ClassVar[Traits]

    @property
    def cancelled(self) -> bool:
        """Whether someone cancelled the job."""
        ...

    def open(self, job: ClientJob, store: Store) -> None:
        """Prepare for a job whose bundle is in the store."""
        ...

    async def announce(self, site: str, round: int, attempt: int) -> bool:
        """Tell a site to get ready for its part in a round. Not every announced round takes place.

        Returns: False if the attempt is over, because it belonged to an earlier coordinator and
        ended with it.
        """
        ...

    async def unreachable(self, sites: Collection[str]) -> Mapping[str, str]:
        """The sites among these that cannot be reached now, each with a short reason."""
        ...

    async def perform(
        self, assignment: SiteAssignment, *, deadline: float | None, patience_s: float, log: LogLine
    ) -> Delivery:
        """Have a site do an assignment. If this call is cancelled, the site goes on without it.

        Args:
            patience_s: how long to wait for a site that cannot be reached.

        Raises:
            SiteError: the site failed, or missed the deadline (`time.monotonic()`).
            IntegrityError: the site's manifest is invalid.
        """
        ...

    @property
    def endings(self) -> Mapping[str, str]:
        """site -> how its script failed after its last round, as far as known after `end`."""
        ...

    def cancel(self) -> None:
        """Stop all work in progress; waiting `perform` calls raise `SiteError`."""
        ...

    async def end(self) -> None:
        """End all scripts after the job, and remove everything that they leave."""
        ...
