"""Scratch folders, which go with the process that made them; those of processes that were killed
go when the next one comes.
"""

import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from fedpool import exclusive
from fedpool.refusals import explained

_LOG = logging.getLogger("fedpool.scratch")


class Scratch:
    """A new folder that nobody else uses, held by a lock that the system lets go of when this
    process ends.

    Args:
        parent: where; its abandoned folders of the same prefix are removed.
        prefix: of its name.

    Raises:
        StoreRefused: nothing can be written there.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        with explained(parent):
            parent.mkdir(parents=True, exist_ok=True)
            # Between its making and its locking, a folder would look abandoned to others.
            with exclusive.locked(parent, _LOG.warning, wait=True) as has_locks:
                if has_locks:  # without them nobody can tell whose folder is abandoned
                    _remove_abandoned(parent, prefix)
                self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent.resolve()))
                self._descriptor: int | None = os.open(self.path, os.O_RDONLY)
                exclusive.lock(self._descriptor, str(self.path), _LOG.debug)

    def remove(self) -> None:
        """Remove it with all that is in it. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        # One that is going at this moment, is a file, or is not ours to open stays as it is.
        with suppress(OSError), exclusive.locked(folder, _LOG.debug) as ours:
            if ours:
                shutil.rmtree(folder, ignore_errors=True)
