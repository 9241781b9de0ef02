"""Processes that outlive the command that started them: started once, then found again by pid."""

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
"""Becomes the given command, with the default handling of SIGINT."""


@dataclass(frozen=True, slots=True)
class Started:
    """A started process: its pid, and when it began, in seconds since the epoch."""

    pid: int
    created: float


class Processes:
    """The processes of a folder: `NAME.json` identifies one, `NAME.log` has its output.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def log(self, name: str) -> Path:
        """Path of a process's output."""
        return self._folder / f"{name}.log"

    def names(self) -> list[str]:
        """Names of the processes that were started and not stopped, running or not."""
        return sorted(path.stem for path in self._folder.glob("*.json"))

    def find(self, name: str) -> psutil.Process | None:
        """The process, if it runs. Another process with the same pid does not count."""
        try:
            started = Started(**json.loads((self._folder / f"{name}.json").read_text()))
            process = psutil.Process(started.pid)
            same = abs(process.create_time() - started.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None
        return process if same else None

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], sockets: Sequence[int] = ()
    ) -> "subprocess.Popen[bytes]":
        """Start a process in its own session.

        Args:
            sockets: numbers of the sockets that it inherits.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        # A shell makes its background processes ignore SIGINT, and children inherit that. Prefect's
        # worker would then ignore SIGTERM as well, because it handles it as SIGINT.
        deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with self.log(name).open("ab") as output:
            process = subprocess.Popen(
                [*_HEARING, *command] if deaf else command,
                env=dict(environment),
                pass_fds=sockets,
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
        # While this process lives, the new one is its child, so it has to be waited for.
        threading.Thread(target=process.wait, name=f"fedpool-{name}", daemon=True).start()
        return process

    def stop(self, names: Sequence[str]) -> None:
        """End processes and their descendants: SIGTERM, then SIGKILL after a grace. Idempotent."""
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
    """A process and all its descendants; only itself if it has ended meanwhile."""
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
