"""Byte ranges of a local file, from any thread."""

import os
import threading
from pathlib import Path


class LocalFile:
    """Reads byte ranges of a file: (start, stop) -> the bytes in between; a range past its end
    comes back short.

    Stays open for as long as it is used, because opening a file costs as much as reading a block.

    Args:
        path: of the file.
        may_stay_open: limits how many do, for who has many: a round of a thousand updates must not
            need a thousand file descriptors. The others are opened anew for each range.

    Raises:
        FileNotFoundError: there is none.
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

    # Memory as it comes: a bytearray would be filled with zeros first, while all other threads wait
    # for the interpreter.
    data = np.empty(stop - start, np.uint8).data
    filled = 0
    while filled < len(data):
        count = os.preadv(descriptor, [data[filled:]], start + filled)
        if not count:
            return data[:filled]
        filled += count
    return data
