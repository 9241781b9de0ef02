"""Kill a process at a named point: as it writes an object to a local store, or right after.

A job writes its objects in a fixed order, so their paths name every stage of a round::

    python -m fedpool.testing --at 'rounds/00001/round\\.json' --when before job.py

runs `job.py` and kills it with SIGKILL just before round 1 would be committed.
"""

import os
import re
import signal
import sys
import threading
from typing import Any, Literal


def kill_at(path: str, when: Literal["before", "after"] = "before", *, skip: int = 0) -> None:
    """Kill this process with SIGKILL, which it can't catch, as it writes an object.

    Args:
        path: regular expression, searched in the path of an object of a local store; see
            docs/store.md.
        when: before the object exists, or after.
        skip: how many matching objects to let pass first.
    """
    pattern = re.compile(path)
    left = skip
    lock = threading.Lock()
    written: set[str] = set()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # An object is created as a hard link to its temporary file, which is then removed.
        nonlocal left
        if event == "os.link" and pattern.search(os.fsdecode(arguments[1])):
            with lock:
                left -= 1
                if left >= 0:
                    return
                if when == "after":
                    written.add(os.fsdecode(arguments[0]))
                    return
            os.kill(os.getpid(), signal.SIGKILL)
        elif event == "os.remove" and written and os.fsdecode(arguments[0]) in written:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
