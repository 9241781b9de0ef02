"""The folder for Unix sockets: their paths are limited to about 100 bytes."""

import os
import tempfile
from pathlib import Path

from fedpool.errors import ConfigError

MAX_PATH_BYTES = 103
"""The limit of macOS; Linux allows 107."""

_LONGEST_NAME = "fedpool-12345678/100000/s"


def make_socket_folder() -> Path:
    """Make a folder with a path short enough for sockets `N/s` in it.

    It is in the folder for temporary files, or else in one whose path is always short.

    Raises:
        ConfigError: no folder can be made in any of them.
    """
    parents = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp"]
    failures = []
    for parent in dict.fromkeys(filter(None, parents)):
        length = len(os.fsencode(parent)) + 1 + len(_LONGEST_NAME)
        if length > MAX_PATH_BYTES:
            failures.append(f"{parent!r} is {length - MAX_PATH_BYTES} bytes too long")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix="fedpool-", dir=parent))
        except OSError as error:
            failures.append(str(error))
    raise ConfigError(
        f"no folder can be made for the sockets of client scripts ({'; '.join(failures)}): set TMPDIR to one with a short path "
        "that you may write to"
    )
