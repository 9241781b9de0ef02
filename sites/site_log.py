"""The log file of a simulated site, in the job's folder: what its script printed, and why its
rounds failed.
"""

import threading
from datetime import datetime
from pathlib import Path

MAX_BYTES = 8 << 20
"""Of a log file. The one before it stays, so that the last 8 MiB are always there."""


class SiteLog:
    """One site's log file, to which lines are added; thread-safe.

    It is opened anew for each line, because a thousand sites would need a thousand open files. One
    that cannot be written is not the job's matter: it is told once, in place of the first line that
    is lost.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._failed = False

    def write(self, round: int, line: str) -> str | None:
        """Add a line, with the time and the round; returns what is to be told when that failed
        for the first time.
        """
        text = f"{datetime.now():%Y-%m-%d %H:%M:%S} round {round}: {line}\n".encode("utf-8", "replace")
        with self._lock:
            if self._failed:
                return None
            try:
                self._append(text)
            except OSError as error:
                self._failed = True
                return f"the site's log file {self._path} cannot be written: {error}"
        return None

    def _append(self, text: bytes) -> None:
        if not self._path.parent.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            if file.tell() + len(text) <= MAX_BYTES or not file.tell():
                file.write(text)
                return
        self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        self._path.write_bytes(text)
