"""Log files of simulated sites, in the job's folder: script output, and causes of failures."""

import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from fedpool.paths import JobPaths
from fedpool.sites.output import LogLine
from fedpool.store import Store

MAX_BYTES = 8 << 20
"""Limit for one log file. The previous file stays, so the last 8 MiB are always there."""


class SiteLog:
    """One site's log file. Thread-safe.

    The file is opened for each line, because a thousand sites would otherwise need a thousand open
    files. If it cannot be written, the job goes on; the error is returned once, in place of the
    first lost line.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._failed = False

    def write(self, round: int, line: str) -> str | None:
        """Add a line with the time and the round; returns an error message on the first failure."""
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


class SiteLogs:
    """The log files of a job's sites. Thread-safe.

    Args:
        job_id: the job's id.
        store: the local store that holds the files.
        show: see `LocalSites`.
    """

    def __init__(self, job_id: str, store: Store, show: Callable[[str, str], None] | None) -> None:
        self._paths = JobPaths(job_id)
        self._store = store
        self._show = show
        self._logs: dict[str, SiteLog] = {}

    def of(self, site: str) -> SiteLog:
        """A site's log file."""
        return self._logs.setdefault(site, SiteLog(Path(self._store.full(self._paths.log(site)))))

    def writer(self, site: str, round: int, log: LogLine) -> LogLine:
        """A function that writes lines to the site's file, to `show` if given, and to `log`."""
        file = self.of(site)

        def write(line: str) -> None:
            problem = file.write(round, line)
            for each in (problem, line):
                if each is not None:
                    if self._show is not None:
                        self._show(site, each)
                    log(each)

        return write
