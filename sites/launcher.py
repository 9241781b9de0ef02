"""The interface for starting and killing client scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Script:
    """A running client script.

    Attributes:
        pid: its process id.
        output: a file descriptor to read what it prints.
        status: a pipe that delivers its exit code, as a decimal number, when it ends.
    """

    pid: int
    output: int
    status: int


class Launcher(Protocol):
    """Starts and kills client scripts."""

    def start(
        self, script: Path, *, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, seed: int
    ) -> Script:
        """Start a script.

        Args:
            script: its path.
            arguments: its command line.
            environment: variables of this script alone.
            folder: where it runs.
            seed: seed of the script's random generators.

        Raises:
            OSError: this machine has no file handle, memory or process left for it.
            FedpoolError: the process that starts scripts is gone.
        """
        ...

    def kill(self, pid: int) -> None:
        """Kill a script and everything it started; does nothing if it has already ended."""
        ...
