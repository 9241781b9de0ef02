"""`Sites`: how a job reaches its sites. Simulated ones are `LocalSites`, others
`fedpool.tasks.dispatch.PoolSites`.
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
    """What the coordinator has to know of sites, beside how to ask them.

    Attributes:
        simulated: they are processes of the coordinator's machine, and end with it.
        have_runs: a site's part of a round is a Prefect run of its own, and needs no task of the
            round's.
        outlive: a site that was asked stays at work when the coordinator is lost.
        come_back: a site that was lost may be waited for; else it is gone.
    """

    simulated: bool
    have_runs: bool
    outlive: bool
    come_back: bool


SIMULATED = Traits(simulated=True, have_runs=False, outlive=False, come_back=False)
ELSEWHERE = Traits(simulated=False, have_runs=True, outlive=True, come_back=True)


@runtime_checkable  # Prefect asks for the type of a flow's parameters
class Sites(Protocol):
    """How a job reaches its sites; the coordinator knows no more of them than this."""

    names: tuple[str, ...]
    num_slots: int
    traits: ClassVar[Traits]

    @property
    def cancelled(self) -> bool:
        """Whether someone asked for the job to end."""
        ...

    def open(self, job: ClientJob, store: Store) -> None:
        """Get ready for a job whose bundle is in the store."""
        ...

    async def announce(self, site: str, round: int, attempt: int) -> bool:
        """Tell a site that its part in a round will come, so that it is ready; not every round that
        is announced comes.

        Returns: False when that attempt is over: an earlier coordinator's, which ended with it.
        """
        ...

    async def unreachable(self, sites: Collection[str]) -> Mapping[str, str]:
        """Those of some sites that cannot be reached now, each with the reason in a few words."""
        ...

    async def perform(
        self, assignment: SiteAssignment, *, deadline: float | None, patience_s: float, log: LogLine
    ) -> Delivery:
        """Have a site do an assignment. Given up when cancelled: then the site goes on by itself,
        and nobody waits for it.

        Args:
            patience_s: how long a site that cannot be reached is waited for.

        Raises:
            SiteError: it failed, or missed the deadline (`time.monotonic()`).
            IntegrityError: what it left as a manifest is none.
        """
        ...

    @property
    def endings(self) -> Mapping[str, str]:
        """site -> how its script failed after its last round, once `end` was called, as far as
        is known by then.
        """
        ...

    def cancel(self) -> None:
        """Stop what is under way: whoever waits for a site gets a `SiteError`."""
        ...

    async def end(self) -> None:
        """The job is over: tell the scripts, and leave nothing of them behind."""
        ...
