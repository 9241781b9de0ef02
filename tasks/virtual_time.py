"""Virtual time of a simulation: each site's current work, from the sites' speeds and the records.

A site needs a fixed number of units of virtual time for an assignment, however long the machine
takes and however often the script is restarted. It does one assignment at a time. When it is done,
it starts the current round, from that round's model, unless it has answered that one already; then
it waits for the next round. Work that ends at the moment when a round closes is in time.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from fedpool.errors import RecipeError
from fedpool.site_order import in_order
from fedpool.tasks.job_record import SPEEDS, EnvironmentRecord
from fedpool.tasks.record import RoundRecord


@dataclass(frozen=True, slots=True)
class Part:
    """A site's current work: its part of a round, and the virtual time at which it will be done."""

    round: int
    ends: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """The sites at a moment of virtual time.

    Attributes:
        units: site -> virtual time that it needs for an assignment.
        now: the moment.
        at_work: site -> its current work.
    """

    units: Mapping[str, float]
    now: float = 0.0
    at_work: Mapping[str, Part] = field(default_factory=dict)

    @classmethod
    def after(cls, units: Mapping[str, float], records: Sequence[RoundRecord]) -> Self:
        """The schedule when the last of some rounds has closed.

        Args:
            records: of all rounds so far, each with its virtual time.
        """
        schedule = cls(units)
        for record in records:
            schedule = schedule.follow(record)
        return schedule

    @property
    def next_end(self) -> float:
        """When the next site is done; infinite if none is working."""
        return min((part.ends for part in self.at_work.values()), default=math.inf)

    def begin(self, round: int, sites: Iterable[str]) -> Self:
        """The schedule after the idle ones among some sites have started their parts of a round."""
        parts = {site: Part(round, self.now + self.units[site]) for site in sites if site not in self.at_work}
        return replace(self, at_work={**self.at_work, **parts})

    def at(self, moment: float) -> "tuple[Self, dict[str, Part]]":
        """The schedule at a later moment, and the work done by then, in site order."""
        done = {site: self.at_work[site] for site in in_order(self.at_work) if self.at_work[site].ends <= moment}
        left = {site: part for site, part in self.at_work.items() if site not in done}
        return replace(self, now=moment, at_work=left), done

    def follow(self, record: RoundRecord) -> Self:
        """The schedule when one more round has closed."""
        closed = self.now if record.virtual_time is None else record.virtual_time
        asked = set(record.sites) - {entry.site for entry in record.not_asked}
        schedule = self.begin(record.round, asked)
        while schedule.next_end < closed:
            schedule, done = schedule.at(schedule.next_end)
            late = {site for site, part in done.items() if part.round < record.round}
            schedule = schedule.begin(record.round, late & asked)
        return schedule.at(closed)[0]


def contradiction(schedule: Schedule | None, record: RoundRecord) -> str | None:
    """How a record contradicts the sites' speeds, as the end of a sentence; None if it doesn't.

    Args:
        schedule: when the previous round had closed; None if the job isn't in virtual time.
    """
    if schedule is None or record.virtual_time is None:
        return (
            None
            if schedule is None and record.virtual_time is None
            else "differs from its job in whether time is virtual"
        )
    if record.virtual_time < schedule.now:
        return f"closed at {record.virtual_time:g}, before the previous round, which closed at {schedule.now:g}"
    left = schedule.follow(record).at_work
    answered = {
        entry.site: record.round for entry in (*record.accepted, *record.rejected, *record.probed, *record.failed)
    }
    came = [*answered.items(), *((entry.site, entry.round) for entry in record.judged_late)]
    for site, round in came:
        if site in left and left[site].round <= round:
            return f"has {site}'s part of round {round}, which ends at {left[site].ends:g}, but closed at {record.virtual_time:g}"
    return None


def units_of(environment: EnvironmentRecord | None) -> Mapping[str, float] | None:
    """site -> virtual time per assignment, from `job.json`; None without virtual time."""
    said: Any = None if environment is None else environment.settings.get(SPEEDS)
    return None if said is None else {site: float(units) for site, units in said.items()}


def check_speed(site: str, units: float) -> None:
    """Raise `RecipeError` for units that no assignment can take."""
    if not (math.isfinite(units) and units > 0):
        raise RecipeError(f"speeds: {site} needs {units} units of virtual time: give a finite number above 0")


def speeds_by_site(speeds: Sequence[float] | Mapping[str, float], sites: Sequence[str]) -> dict[str, float]:
    """site -> units of virtual time.

    Args:
        speeds: a value for each site, in site order or by name.

    Raises:
        RecipeError: the values don't match the sites.
    """
    if not isinstance(speeds, Mapping):
        if len(speeds) != len(sites):
            raise RecipeError(f"speeds has {len(speeds)} values for {len(sites)} sites: give one for each site")
        return dict(zip(sites, speeds, strict=True))
    _name("does not know", set(speeds) - set(sites), sites)
    _name("lacks", set(sites) - set(speeds), sites)
    return {site: speeds[site] for site in sites}


def _name(what: str, wrong: Collection[str], sites: Sequence[str]) -> None:
    if wrong:
        who = ", ".join(in_order(wrong)[:8])
        where = f"speeds names {who}" if what != "lacks" else f"speeds lacks {who}"
        raise RecipeError(f"{where}, but the sites are {', '.join(sites[:8])}: give a value for each site")
