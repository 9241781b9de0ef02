"""The output of a client script: split into lines, logged, and kept for error messages."""

import os
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from fedpool.errors import StoreRefused
from fedpool.sites.missing import missing
from fedpool.storable import storable

MAX_LINES_PER_ROUND = 1000
"""Lines of output that are logged in one round; the last lines are always kept for errors."""

_TAIL_LINES = 200
MAX_LINE_BYTES = 4096

LogLine = Callable[[str], None]


_REFUSED = f"{StoreRefused.__module__}.{StoreRefused.__qualname__}: "


class Output:
    """A script's output: logs lines up to a limit per round, and keeps the last ones for errors.

    Args:
        folder: the scratch folder with the unpacked bundle.
        origin: the folder to show in tracebacks instead, because nobody would look in a scratch
            folder; empty: show paths inside the bundle.
    """

    def __init__(self, folder: Path, origin: str) -> None:
        self._folder = folder
        self._scratch = f'File "{folder}{os.sep}'
        self._shown = f'File "{Path(origin)}{os.sep}' if origin else 'File "'
        self.fd: int | None = None
        self._log: LogLine = lambda line: None
        self._partial = b""
        self._passed = 0
        self._dropped = 0
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def begin(self, log: LogLine) -> None:
        """Begin a round: from now on, lines go to `log`."""
        self._log = log
        self._passed = self._dropped = 0
        self.forget()

    def forget(self) -> None:
        """Forget the lines kept for error messages."""
        self._tail.clear()

    def read(self) -> None:
        """Read the available output."""
        if self.fd is None:
            return
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self.fd = None
        *lines, self._partial = (self._partial + data).split(b"\n")
        while len(self._partial) > MAX_LINE_BYTES:
            lines.append(self._partial[:MAX_LINE_BYTES])
            self._partial = self._partial[MAX_LINE_BYTES:]
        for line in lines:
            self._pass(line)

    def drain(self) -> None:
        """Read everything that an ended script left in the pipe."""
        if self.fd is None:
            return
        while self.fd is not None and wait([self.fd], 0):
            self.read()

    def finish(self) -> None:
        """End the round: log the last line, and how many lines were left out."""
        self.drain()
        if self._partial:
            self._pass(self._partial)
            self._partial = b""
        if self._dropped:
            self._log(f"... {self._dropped} more lines, not shown (limit: {MAX_LINES_PER_ROUND} per round)")
            self._dropped = 0

    def traceback(self) -> str:
        """The last traceback that was printed, or else the last lines, for an error message."""
        if self._partial:
            self._pass(self._partial)
            self._partial = b""
        lines = list(self._tail)
        # A full disk is not the script's fault, so its traceback says nothing.
        if lines and lines[-1].startswith(_REFUSED):
            return f"\n{lines[-1].removeprefix(_REFUSED)}"
        starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
        chosen = lines[starts[0] :] if starts else lines[-5:]
        return "".join(f"\n{line}" for line in [*chosen, *missing(chosen, self._folder)])

    def _pass(self, line: bytes) -> None:
        text = storable(line[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip("\r"))
        text = text.replace(self._scratch, self._shown)  # only in tracebacks, not in paths that the script prints
        self._tail.append(text)
        if self._passed < MAX_LINES_PER_ROUND:
            self._passed += 1
            self._log(text)
        else:
            self._dropped += 1
