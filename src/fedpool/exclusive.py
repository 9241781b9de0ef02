"""Locks and exclusive moves on local file systems, even those that lack some calls: FUSE, NFS, FAT.

If a call isn't supported, the next best one is used, and `told` gets a sentence about the
consequences. docs/store.md lists the remaining guarantees.

Folders themselves are locked, with the system's locks. Lock files, such as those of `filelock`,
wouldn't do. A job's folder contains only the job's own files. A scratch folder is removed by the
process that holds its lock. Readers check whether a folder is locked without locking it, even if
they can't write to it. Without locks (NFS, FUSE) the work continues, with a warning.
"""

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedpool.patience import pauses

Told = Callable[[str], None]

NOT_SUPPORTED = frozenset(
    {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.ENOLCK, errno.EXDEV, errno.EMLINK}
)
"""Error numbers of calls that a file system lacks, or that don't work between two given files."""

# Locking on NFS needs a descriptor that is open for writing, which a folder's can't be.
_NO_LOCK = NOT_SUPPORTED | {errno.EBADF, errno.EINVAL}
_NO_RENAME = NOT_SUPPORTED | {errno.EINVAL}
_NO_SYNC = NOT_SUPPORTED | {errno.EINVAL}
_LOOK_S, _LOOK_PAUSE_S = 0.2, 0.02
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


@contextmanager
def locked(folder: Path, told: Told, *, wait: bool = False) -> Iterator[bool | None]:
    """Lock a folder for a while. The lock of a killed process is released.

    Args:
        wait: wait until the lock is free.

    Yields: whether the folder is locked by this call; None if the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield lock(descriptor, str(folder), told, wait=wait)
    finally:
        os.close(descriptor)


def lock(descriptor: int, where: str, told: Told, *, wait: bool = False) -> bool | None:
    """Lock an open folder until it is closed or its process ends; see `locked`."""
    try:
        _lock(descriptor, wait)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCK:
            raise
        told(
            f"{where} cannot be locked, because its file system has no locks ({error.strerror}): "
            "make sure that only one process uses it"
        )
        return None
    return True


def _lock(descriptor: int, wait: bool) -> None:
    for pause_s in pauses(_LOOK_S, _LOOK_PAUSE_S):  # `is_locked` holds the lock for an instant
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            if not pause_s:
                raise
            time.sleep(pause_s)
        else:
            return


def is_locked(folder: Path) -> bool | None:
    """Whether a folder is locked; None if it doesn't exist or its file system has no locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCK:
            raise
        return None
    else:
        return False
    finally:
        os.close(descriptor)


def sync(descriptor: int, where: str, told: Told) -> None:
    """Flush an open file to disk and drop its cached pages, as far as the file system can."""
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        told(f"{where} cannot be synced on its file system ({error.strerror}): a power failure may lose it")


def move(local: Path, target: Path, told: Told) -> None:
    """Move a file to a path that must be free.

    Raises:
        FileExistsError: the path is taken.
    """
    try:
        os.link(local, target)  # fails if the target exists, unlike a rename
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        if error.errno not in (errno.EXDEV, errno.EMLINK):
            told(
                f"{target.parent} has no hard links ({error.strerror}): "
                "objects are moved into place with a rename that does not overwrite"
            )
            with suppress(_RenameMissing):
                _rename_noreplace(local, target)
                return
        _copy(local, target, told)
    local.unlink()


def _copy(local: Path, target: Path, told: Told) -> None:
    """Copy next to the target, because the file may be on another file system; move the copy."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        shutil.copyfile(local, partial)
        try:
            os.link(partial, target)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            _rename(partial, target, told)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def _rename(partial: Path, target: Path, told: Told) -> None:
    try:
        _rename_noreplace(partial, target)
    except _RenameMissing as error:
        told(
            f"{target.parent} has no rename that does not overwrite ({error.strerror}): objects are first reserved "
            "with an empty file. If a crash leaves such a file, remove it by hand"
        )
        with target.open("xb"):
            pass
        partial.replace(target)


class _RenameMissing(OSError):
    """The file system has no rename that fails if the target exists."""


def _rename_noreplace(local: Path, target: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform != "linux" or not hasattr(libc, "renameat2"):
        raise _RenameMissing(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(_AT_FDCWD, os.fsencode(local), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        kind = _RenameMissing if number in _NO_RENAME else OSError
        raise kind(number, os.strerror(number), str(local), None, str(target))
