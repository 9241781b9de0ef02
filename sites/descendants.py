"""Finding and killing everything that a process started, including what left its session.

A child that starts its own session (`start_new_session=True`, a daemon) is out of reach of a signal
to the process group. On Linux a process can declare itself the *subreaper* of its descendants: it
becomes the parent of orphaned descendants, so killing its children until none are left finds all of
them. Elsewhere (macOS) only descendants whose parents are still alive are found.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_OWN_THREADS = Path("/proc/self/task")


def adopt_orphans() -> bool:
    """Make this process the parent of its orphaned descendants; returns False if the system cannot.

    Adopted children have to be waited for, like all children. A fork does not inherit this setting.
    """
    return bool(_can_adopt() and ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def own_children() -> list[int]:
    """Pids of this process's children, including adopted ones.

    If the system cannot adopt, pids of all descendants that can be found.
    """
    if not _can_adopt():
        return living_descendants(os.getpid())
    pids: list[int] = []
    for thread in _OWN_THREADS.iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended
            pids += map(int, (thread / "children").read_text().split())
    return pids


def living_descendants(pid: int) -> list[int]:
    """Pids of a process's descendants whose parents are still alive."""
    import psutil

    try:
        return [process.pid for process in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_group(pid: int, number: int = signal.SIGKILL) -> bool:
    """Signal a process group; returns whether it exists."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    return True


def end_children() -> list[tuple[int, int]]:
    """Kill all children and what they leave behind; returns the pid and wait status of each."""
    ended = []
    while True:
        for pid in own_children():
            kill(pid)
        try:
            ended.append(os.waitpid(-1, 0))
        except ChildProcessError:
            return ended


@cache
def _can_adopt() -> bool:
    return sys.platform == "linux" and (_OWN_THREADS / str(os.getpid()) / "children").exists()
