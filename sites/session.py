"""A session: whoever does the assignments of one job at one site, one after the other, and may stay
warm in between.

A client script is one (`ScriptSession`). Anything that takes an assignment and leaves an update at
its path can be another, such as a coordinator that answers for sites of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedpool.client.hosts import Assignment
from fedpool.sites.output import LogLine
from fedpool.sites.scalars import Scalar

END_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class Work:
    """What a session runs: a script, where, and as whom."""

    job_id: str
    site: str
    script: Path
    arguments: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    site_index: int = 0
    num_sites: int = 1
    origin: str = ""
    """Folder that tracebacks show the script in, where it was bundled from; empty: none, as on
    another machine.
    """


@dataclass(frozen=True, slots=True)
class Reply:
    """What a script sent for an assignment: the fields of its `update` message, the last value
    of each logged scalar, and all of them for trackers.
    """

    update: Mapping[str, Any]
    logged: Mapping[str, float]
    scalars: Sequence[Scalar] = ()


class Session(Protocol):
    """Does the assignments of one job at one site; not thread-safe, except for `kill`."""

    def perform(self, assignment: Assignment, *, deadline: float | None, log: LogLine) -> Reply:
        """Do an assignment: read the model where it says, and leave the update where it says.

        Args:
            assignment: what to do.
            deadline: `time.monotonic()` at which it is given up; None waits for ever.
            log: called with each line that is printed meanwhile.

        Raises:
            SiteError: it failed, was killed or did not answer in time; the session can be used
                again, and begins afresh.
        """
        ...

    def end(self, grace_s: float = END_GRACE_S) -> str | None:
        """The job is over: finish within that time, and leave nothing behind.

        Returns: how it failed at its end; None when it ended well, or was killed, or there is
        nothing to end.
        """
        ...

    def kill(self) -> None:
        """End it and all that it started, for good; a `perform` that is under way raises. From
        any thread.
        """
        ...

    @property
    def killed(self) -> bool:
        """Whether `kill` was called."""
        ...
