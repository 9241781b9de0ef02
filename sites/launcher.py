"""What starts client scripts, as their host sees it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Script:
    """A running client script: its pid, what it prints, and the pipe that tells its exit code (a
    decimal number) at its end.
    """

    pid: int
    output: int
    status: int


class Launcher(Protocol):
    """What starts and kills client scripts."""

    def start(
        self, script: Path, *, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, seed: int
    ) -> Script:
        """Start a script.

        Args:
            script: its path.
            arguments: its command line.
            environment: variables added to the host's.
            folder: where it runs.
            seed: for the random generators it starts with.

        Raises:
            OSError: this machine has no file handle, no memory or no process left for it.
            FedpoolError: what starts scripts is gone.
        """
        ...

    def kill(self, pid: int) -> None:
        """Kill a script and all it started; nothing happens when it ended already."""
        ...
