"""Byte ranges of a local file, from any thread, and the objects of a local store.

Who can write to a store could leave something else in the place of an object: a FIFO, whose reader
would wait for ever; a link to a file of someone else. So an object is only opened if it is a
regular file, and none of the folders between the job's and the object is a link. The store itself
and the job's folder may be links: their owner has made them.
"""

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpool.errors import IntegrityError

_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # without O_NONBLOCK, opening a FIFO waits for a writer
# With O_PATH, it is enough to be allowed to search the folder.
_FOLDER = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)


class LocalFile:
    """Reads byte ranges of a file: (start, stop) -> bytes. A range ends at the end of the file.

    The file stays open as long as this object lives, because opening a file costs as much as
    reading a block.

    Args:
        open_file: returns a descriptor of the file.
        may_stay_open: limits how many files stay open, so a round of a thousand updates doesn't
            need a thousand file descriptors. Files beyond the limit are reopened for each range.

    Raises:
        FileNotFoundError: there is no such file.
        IntegrityError: it is not a regular file.
    """

    def __init__(self, open_file: Callable[[], int], may_stay_open: threading.Semaphore | None = None) -> None:
        self._open = open_file
        self._descriptor: int | None = None
        self._limit = may_stay_open
        if may_stay_open is None or may_stay_open.acquire(blocking=False):
            try:
                self._descriptor = open_file()
            finally:
                if self._descriptor is None and may_stay_open is not None:
                    may_stay_open.release()

    def __call__(self, start: int, stop: int) -> memoryview:
        """Read a range."""
        if self._descriptor is not None:
            return _read(self._descriptor, start, stop)
        descriptor = self._open()
        try:
            return _read(descriptor, start, stop)
        finally:
            os.close(descriptor)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            if self._limit is not None:
                self._limit.release()


def open_file(path: str | Path, *, follow: bool = True) -> int:
    """Open a regular file for reading; returns its descriptor.

    Args:
        follow: whether the path may be a link.

    Raises:
        IntegrityError: it is something else.
    """
    return _open_regular(os.fspath(path), None, str(path), follow=follow)


def open_object(root: str, path: str) -> int:
    """Open an object of a local store for reading; returns its descriptor.

    Args:
        root: the store's folder.
        path: the object's path, relative to it; it begins with the job's folder.

    Raises:
        FileNotFoundError: there is no object.
        IntegrityError: it is not a regular file, or a folder below the job's is a link.
    """
    with _folder_of(root, path) as (folder, name):
        return _open_regular(name, folder, f"{root}/{path}", follow=False)


def object_size(root: str, path: str) -> int:
    """Size of an object in bytes; the arguments and errors are those of `open_object`."""
    with _folder_of(root, path) as (folder, name):
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise _irregular(f"{root}/{path}", found.st_mode)
        return found.st_size


def remove_object(root: str, path: str) -> None:
    """Remove an object, or what is in its place; the arguments and errors as in `open_object`."""
    with _folder_of(root, path) as (folder, name):
        os.unlink(name, dir_fd=folder)


@contextmanager
def _folder_of(root: str, path: str) -> Iterator[tuple[int, str]]:
    """An object's folder, open, and its name there. Errors get the object's whole path."""
    *folders, name = path.split("/")
    at = None
    try:
        at = os.open("/".join([root, *folders[:1]]) or "/", _FOLDER)
        for number, folder in enumerate(folders[1:], 2):
            below = _open_folder(folder, at, "/".join([root, *folders[:number]]))
            os.close(at)
            at = below
        yield at, name
    except OSError as error:
        error.filename = f"{root}/{path}"
        raise
    finally:
        if at is not None:
            os.close(at)


def _open_folder(name: str, above: int, where: str) -> int:
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
    except OSError as error:
        mode = 0
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            mode = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
        if not stat.S_ISLNK(mode):
            raise
        raise _irregular(where, mode) from None


def _open_regular(path: str, folder: int | None, where: str, *, follow: bool) -> int:
    try:
        descriptor = os.open(path, _FILE if follow else _FILE | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # of a link, and of a socket
            raise
        raise _irregular(where, os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise _irregular(where, mode)


def _irregular(where: str, mode: int) -> IntegrityError:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFDIR: "a folder",
        stat.S_IFSOCK: "a socket",
    }
    return IntegrityError(
        f"{where} is {kinds.get(stat.S_IFMT(mode), 'a device')}, where a regular file or its folder belongs: find out who has "
        "put it there, and remove it"
    )


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
