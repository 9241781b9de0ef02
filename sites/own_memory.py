"""Hides this process's memory and environment from other processes of its user."""

import ctypes
import sys

_PR_SET_DUMPABLE = 4


def hide_memory() -> bool:
    """Keep processes of the same user from reading `/proc/PID/environ` and this process's memory.

    Client scripts that run as the worker's user could find its secrets there. Root still can, if it
    has the capability CAP_SYS_PTRACE or CAP_SYS_ADMIN. The kernel also writes no core dump of this
    process any more.

    Returns: whether the system can do that; only Linux can.
    """
    return bool(sys.platform == "linux" and ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)
