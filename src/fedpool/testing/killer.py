"""Kill a process at a named point: as it puts a certain object into a local store, or right after.

All that a job does is in the order in which it writes its objects, so that their paths name every
stage of a round::

    python -m fedpool.testing --at 'rounds/00001/round\\.json' --when before job.py

runs `job.py` and ends it with SIGKILL in the instant before round 1 would be committed.
"""

import os
import re
import signal
import sys
import threading
from typing import Any, Literal


def kill_at(path: str, when: Literal["before", "after"] = "before", *, skip: int = 0) -> None:
    """Have this process killed with SIGKILL, which it cannot catch, as it writes an object to a
    local store.

    Args:
        path: regular expression, searched in the object's path; see "The store" in the
            documentation.
        when: before the object is there, or after.
        skip: how many such objects to let pass first.
    """
    pattern = re.compile(path)
    left = skip
    lock = threading.Lock()
    written: set[str] = set()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # An object comes to be by a hard link, after which the file that it was written as is
        # removed.
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
