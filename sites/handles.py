"""The limit on open files: raised for client scripts, and explained when it is reached."""

import errno
import os
import resource

from fedpool.errors import ConfigError

_PER_SCRIPT, _MOST_PER_SCRIPT = 3, 4
"""File handles that a running script takes in its host: its output, its status and the link;
while it starts, also the listening socket.
"""
_BESIDES, _MOST_BESIDES = 64, 256
"""File handles of the host itself: libraries, the store's files, connections to the server."""


def allow_scripts(at_least: int, at_most: int, *, remedy: str) -> None:
    """Raise this process's limit on open files, and so its children's, to what its scripts need.

    Args:
        at_least: number of scripts that will certainly run at the same time.
        at_most: number of scripts that may run at the same time.
        remedy: an alternative to raising the limit, for the message.

    Raises:
        ConfigError: the system's limit is too low for `at_least` scripts.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    limit = float("inf") if hard == resource.RLIM_INFINITY else hard
    needed = _BESIDES + _PER_SCRIPT * at_least
    if needed > limit:
        raise ConfigError(
            f"{at_least} client scripts at the same time need about {needed} open files, but this process may have only "
            f"{hard}: raise the limit (`ulimit -Hn`), or {remedy}"
        )
    wanted = int(min(_MOST_BESIDES + _MOST_PER_SCRIPT * at_most, limit))
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def explain(error: OSError) -> str:
    """An error of the operating system as text, with the remedy if no file handle was left."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return str(error)
    whose = "this process has" if error.errno == errno.EMFILE else "this machine has"
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"{whose} no file handles left ({os.strerror(error.errno)}, `ulimit -n` is {limit}): raise the limit, or run fewer "
        "scripts at a time"
    )
