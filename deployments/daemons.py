"""Processes that outlive the command which started them: started once, found again, told from
strangers of the same pid.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_END_GRACE_S = 20.0

_HEARING = (
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])",
)
"""Becomes the command that follows, with SIGINT as it is by default."""


@dataclass(frozen=True, slots=True)
class Started:
    """A process that was started: its pid, and when it began (seconds since the epoch)."""

    pid: int
    created: float


class Processes:
    """The processes of one folder: `NAME.json` says which one it is, `NAME.log` holds what it
    prints.

    Args:
        folder: theirs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def log(self, name: str) -> Path:
        """Where a process's output goes."""
        return self._folder / f"{name}.log"

    def names(self) -> list[str]:
        """Those that were started and not stopped, running or not."""
        return sorted(path.stem for path in self._folder.glob("*.json"))

    def find(self, name: str) -> psutil.Process | None:
        """The process, if it runs."""
        try:
            started = Started(**json.loads((self._folder / f"{name}.json").read_text()))
            process = psutil.Process(started.pid)
            same = abs(process.create_time() - started.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None
        return process if same else None

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """Start a process in a session of its own."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # A shell has what it runs in the background ignore SIGINT, and that is inherited. Prefect's
        # worker then ignores SIGTERM, too, which it takes for a SIGINT.
        deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with self.log(name).open("ab") as output:
            process = subprocess.Popen(
                [*_HEARING, *command] if deaf else command,
                env=dict(environment),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        started = Started(process.pid, psutil.Process(process.pid).create_time())
        partial = self._folder / f".{name}.{os.getpid()}"
        partial.write_text(json.dumps(asdict(started)))
        partial.replace(self._folder / f"{name}.json")
        # While we live it is our child: somebody has to take note of its end.
        threading.Thread(target=process.wait, name=f"fedpool-{name}", daemon=True).start()
        return process

    def stop(self, names: Sequence[str]) -> None:
        """End processes and all they started: asked first, killed after a grace. Harmless for
        what does not run.
        """
        found = [process for name in names if (process := self.find(name)) is not None]
        families = [process for parent in found for process in _family(parent)]
        for process in found:
            _signal(process, signal.SIGTERM)
        _, alive = psutil.wait_procs(found, timeout=_END_GRACE_S)
        for process in (*alive, *families):
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(families, timeout=_END_GRACE_S)
        for name in names:
            (self._folder / f"{name}.json").unlink(missing_ok=True)


def _family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it has started; just itself when it has ended meanwhile."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return [process]


def _signal(process: psutil.Process, number: int) -> None:
    if process.is_running():
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            return
