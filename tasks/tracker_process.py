"""The process in which a tracker's library runs, at the lowest priority.

It reads messages from its input, a JSON object per line: `begin` describes the job, `scalars` has
rows of name, value, step and time for a run, `end` says how the job ended. The process ends at the
end of the input, even if the coordinator was killed. Failed writes are retried with growing pauses,
because servers come back; after the end of the input, only for a short time. Warnings go to its
output, after the prefix `WARNING`.
"""

import importlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Protocol

SERVER_RUN = "server"
"""The run of the job itself, in addition to those of the sites."""
WARNING = "fedpool-warning: "
DONE = "fedpool-done"
"""The last line of a process that has written everything. A library can end the process with any
exit code, even 0, so the code alone proves nothing.
"""
GAVE_UP = 3
"""Exit code of a process that could not write everything."""
GRACE_S = 5.0
"""How long failed writes are retried after the end of the input."""

_MAX_PAUSE_S = 60.0
_MAX_WAITING_BYTES = 256 << 20
"""Maximum backlog while a tracker fails; further messages are dropped."""

Row = tuple[str, float, int, float]
"""Name, value, step and time in seconds since 1970."""


class Refused(Exception):
    """The tracker will never accept this message."""


class Writer(Protocol):
    """A tracker. A method that raises, except with `Refused`, is called again the same way."""

    def begin(self, target: str, job_id: str, name: str, params: Mapping[str, str]) -> None:
        """Begin or continue the runs of a job."""
        ...

    def scalars(self, run: str, rows: Sequence[Row]) -> None:
        """Add scalars to a run."""
        ...

    def end(self, status: str, texts: Mapping[str, str]) -> None:
        """The job has ended: `COMPLETED`, `FAILED` or `CANCELLED`."""
        ...


class Inbox:
    """Messages waiting to be written, read by a thread as they arrive. Thread-safe."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self.ended = threading.Event()
        """Set when no more messages will arrive."""
        self.dropped = 0
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def first(self) -> dict[str, Any] | None:
        """The oldest message, without removing it; None if no more will arrive."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self.ended.is_set())
            line = self._lines[0] if self._lines else None
        message: dict[str, Any] | None = None if line is None else json.loads(line)
        return message

    def done(self) -> None:
        """Remove the oldest message: it is written."""
        with self._changed:
            self._bytes -= len(self._lines.popleft())

    def _read(self) -> None:
        for line in self._source:
            with self._changed:
                # The end is never dropped: without it, a run would look as if it were still
                # running.
                if self._bytes + len(line) > _MAX_WAITING_BYTES and not line.startswith(b'{"do": "end"'):
                    self.dropped += 1
                    continue
                self._lines.append(line)
                self._bytes += len(line)
                self._changed.notify()
        with self._changed:
            self.ended.set()
            self._changed.notify()


def serve(writer: Writer, inbox: Inbox) -> int:
    """Write messages until there are no more; returns the exit code."""
    num_failures, ended = 0, None
    while (message := inbox.first()) is not None:
        try:
            getattr(writer, message.pop("do"))(**message)
        except Refused as refused:
            _warn(f"it refused a message, which is lost: {refused}")
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a tracker's library may raise anything
            _warn(f"writing failed and is retried: {_brief(error)}")
            num_failures += 1
            if inbox.ended.is_set():
                ended = ended or time.monotonic()
                if time.monotonic() - ended > GRACE_S:
                    return GAVE_UP
            # While messages arrive, wait for the pause or the last message; after that, only
            # briefly.
            pause_s = min(_MAX_PAUSE_S, 0.5 * 2 ** min(num_failures, 10))
            if inbox.ended.wait(pause_s):
                threading.Event().wait(min(pause_s, 0.5))
            continue
        num_failures = 0
        inbox.done()
    if inbox.dropped:
        _warn(f"{inbox.dropped} messages were dropped while writing failed")
    return 0


def _warn(text: str) -> None:
    print(WARNING + " ".join(text.split())[:1000], flush=True)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def main(inbox: Inbox) -> int:
    """Serve the tracker whose module is named on the command line; returns the exit code."""
    os.nice(10)
    # A tracker's library would import torch, which takes seconds and much memory, and it never gets
    # tensors.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    try:
        writer: Writer = importlib.import_module(sys.argv[1]).make_writer()
    except (Exception, SystemExit) as error:  # noqa: BLE001  # its module may raise anything
        _warn(f"{sys.argv[1]} cannot be used: {_brief(error)}")
        return GAVE_UP
    code = serve(writer, inbox)
    if code == 0:
        print(DONE, flush=True)
    return code


def _run() -> None:
    inbox = Inbox(sys.stdin.buffer)
    code = main(inbox)
    if not inbox.ended.is_set():
        # Its thread still reads the input, and the interpreter would abort when it can't stop it.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _run()
