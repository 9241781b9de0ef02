"""A session: does the assignments of one job at one site in turn, and may stay warm between them.

A client script is a session (`ScriptSession`). Anything else that takes an assignment and leaves an
update at its path can be one, such as a coordinator that answers for its own sites.
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
    """The script that a session runs, with its arguments and its identity."""

    job_id: str
    site: str
    script: Path
    arguments: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    site_index: int = 0
    num_sites: int = 1
    origin: str = ""
    """Folder that the script was bundled from, for tracebacks; empty: on another machine."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A script's answer to an assignment.

    Attributes:
        update: fields of its `update` message.
        logged: last value of each logged scalar.
        scalars: all logged scalars, for trackers.
    """

    update: Mapping[str, Any]
    logged: Mapping[str, float]
    scalars: Sequence[Scalar] = ()


class Session(Protocol):
    """Does the assignments of one job at one site. Not thread-safe, except for `kill`."""

    def perform(self, assignment: Assignment, *, deadline: float | None, log: LogLine) -> Reply:
        """Do an assignment, which names the paths of the model and the update.

        Args:
            assignment: the work to do.
            deadline: `time.monotonic()` at which to give up; None: no deadline.
            log: called with each line of output.

        Raises:
            SiteError: the assignment failed, was killed or missed its deadline. The session can be
                used again, and starts afresh.
        """
        ...

    def end(self, grace_s: float = END_GRACE_S) -> str | None:
        """Finish at the end of the job, within `grace_s`, and leave nothing behind.

        Returns: how the session failed at its end; None if it ended well, was killed, or was not
        running.
        """
        ...

    def kill(self) -> None:
        """End the session and all that it started, for good, from any thread; `perform` raises."""
        ...

    @property
    def killed(self) -> bool:
        """Whether `kill` was called."""
        ...
