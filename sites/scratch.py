"""Scratch folders: removed by the process that made them, or by the next one if it was killed."""

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
    """A new folder that no other process uses. A lock marks it as in use until this process ends.

    Args:
        parent: the folder to make it in; abandoned folders with the same prefix are removed from
            it.
        prefix: prefix of its name.

    Raises:
        StoreRefused: nothing can be written there.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        with explained(parent):
            parent.mkdir(parents=True, exist_ok=True)
            # A folder that is made but not yet locked would look abandoned to other processes.
            with exclusive.locked(parent, _LOG.warning, wait=True) as has_locks:
                if has_locks:  # without locks, abandoned folders cannot be recognized
                    _remove_abandoned(parent, prefix)
                self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent.resolve()))
                self._descriptor: int | None = os.open(self.path, os.O_RDONLY)
                exclusive.lock(self._descriptor, str(self.path), _LOG.debug)

    def remove(self) -> None:
        """Remove the folder and its contents. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        # Skip folders that are being removed, files, and folders that this user may not open.
        with suppress(OSError), exclusive.locked(folder, _LOG.debug) as ours:
            if ours:
                shutil.rmtree(folder, ignore_errors=True)
