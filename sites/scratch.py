"""Scratch folders, which go with the process that made them; those of processes that were killed go when the next one comes."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpool import exclusive
from fedpool.refusals import explained

_LOG = logging.getLogger("fedpool.scratch")


class Scratch:
    """A new folder that nobody else uses, held by a lock that the system lets go of when this process ends.

    Args:
        parent: where; its abandoned folders of the same prefix are removed.
        prefix: of its name.

    Raises:
        StoreRefused: nothing can be written there.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        with explained(parent):
            parent.mkdir(parents=True, exist_ok=True)
            with _locked(
                parent
            ) as locks:  # between its making and its locking, a folder would look abandoned to others
                if locks:  # without locks nobody can tell whose folder is abandoned
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
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # it is going at this moment, or is none
            continue
        try:
            if exclusive.lock(descriptor, str(folder), _LOG.debug):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder while others that do so wait; tells whether its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield bool(exclusive.lock(descriptor, str(folder), _LOG.warning, wait=True))
    finally:
        os.close(descriptor)
