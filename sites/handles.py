"""File handles: how many a process may have open, and what to say when there are none left."""

import errno
import os
import resource

from fedpool.errors import ConfigError

_PER_SCRIPT, _MOST_PER_SCRIPT = 3, 4
"""What a live script takes of its host: its output, its status and the link; as it starts, the
socket that waits for it.
"""
_BESIDES, _MOST_BESIDES = 64, 256
"""What the host itself uses: libraries, the store's files, connections to the Prefect server."""


def allow_scripts(at_least: int, at_most: int, *, remedy: str) -> None:
    """Let this process, and so its children, have as many open files as its live scripts may take.

    Args:
        at_least: scripts that will certainly live at the same time.
        at_most: scripts that may.
        remedy: what to do beside raising the limit.

    Raises:
        ConfigError: the system does not allow enough for `at_least`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    limit = float("inf") if hard == resource.RLIM_INFINITY else hard
    needed = _BESIDES + _PER_SCRIPT * at_least
    if needed > limit:
        raise ConfigError(
            f"{at_least} client scripts that live at the same time need about {needed} open files, and this process may have "
            f"{hard}: raise the limit (`ulimit -Hn`), or {remedy}"
        )
    wanted = int(min(_MOST_BESIDES + _MOST_PER_SCRIPT * at_most, limit))
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def explain(error: OSError) -> str:
    """An error of the operating system, with the remedy where it is the lack of a file handle."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return str(error)
    whose = "this process has" if error.errno == errno.EMFILE else "this machine has"
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"{whose} no file handle left ({os.strerror(error.errno)}, `ulimit -n` is {limit}): raise the limit, or run fewer "
        "scripts at a time"
    )
