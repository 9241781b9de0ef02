"""Byte ranges of a local file, from any thread."""

import os
import threading
from pathlib import Path


class LocalFile:
    """Reads byte ranges of a file: (start, stop) -> bytes. A range ends at the end of the file.

    The file stays open as long as this object lives, because opening a file costs as much as
    reading a block.

    Args:
        path: the file's path.
        may_stay_open: limits how many files stay open, so a round of a thousand updates doesn't
            need a thousand file descriptors. Files beyond the limit are reopened for each range.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | Path, may_stay_open: threading.Semaphore | None = None) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._limit = may_stay_open
        if may_stay_open is None or may_stay_open.acquire(blocking=False):
            try:
                self._descriptor = _open(path)
            finally:
                if self._descriptor is None and may_stay_open is not None:
                    may_stay_open.release()

    def __call__(self, start: int, stop: int) -> memoryview:
        """Read a range."""
        if self._descriptor is not None:
            return _read(self._descriptor, start, stop)
        descriptor = _open(self._path)
        try:
            return _read(descriptor, start, stop)
        finally:
            os.close(descriptor)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            if self._limit is not None:
                self._limit.release()


def _open(path: str | Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _read(descriptor: int, start: int, stop: int) -> memoryview:
    import numpy as np

    # Uninitialised memory: a bytearray would first be zeroed, while all other threads wait for the
    # interpreter.
    data = np.empty(stop - start, np.uint8).data
    filled = 0
    while filled < len(data):
        count = os.preadv(descriptor, [data[filled:]], start + filled)
        if not count:
            return data[:filled]
        filled += count
    return data
