"""Where sessions' sockets lie: the path of a Unix socket is limited to about 100 bytes, and
`TMPDIR` may be longer.
"""

import os
import tempfile
from pathlib import Path

from fedpool.errors import ConfigError

MAX_PATH_BYTES = 103
"""What macOS takes; Linux takes 107."""

_LONGEST_NAME = "fedpool-12345678/100000/s"


def make_socket_folder() -> Path:
    """A new folder, short enough for sockets `N/s` in it: in the folder for temporary files, else
    in one that is always short.

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
        f"there is no folder for the sockets of client scripts ({'; '.join(failures)}): set TMPDIR to a short one that you "
        "may write to"
    )
