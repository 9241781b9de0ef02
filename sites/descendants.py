"""All that a process has started, also what has left its session: adopted, found and killed.

A child that starts a session of its own (`start_new_session=True`, a daemon) is out of reach of a
signal to the process group. On Linux a process can declare itself the *subreaper* of its
descendants: what loses its parent becomes its own child, and so can be found by looking at its
children until there are none. Elsewhere (macOS) only those are found whose parents still live.
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
    """Have whatever this process's descendants leave behind become its own children; False where
    the system cannot.

    Adopted children are to be waited for, as all children are. Not inherited by a fork.
    """
    return bool(_can_adopt() and ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def own_children() -> list[int]:
    """Pids of this process's children, the adopted among them; where it cannot adopt, of all
    descendants that can be found.
    """
    if not _can_adopt():
        return living_descendants(os.getpid())
    pids: list[int] = []
    for thread in _OWN_THREADS.iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended
            pids += map(int, (thread / "children").read_text().split())
    return pids


def living_descendants(pid: int) -> list[int]:
    """Pids of what a process has started, and what that has started, as far as their parents
    still live.
    """
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
    """Signal a process group; returns whether there is one."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    return True


def end_children() -> list[tuple[int, int]]:
    """Kill all children and what they leave behind, until nothing is left; returns pid and wait
    status of each.
    """
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
