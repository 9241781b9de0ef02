"""Locks and exclusive moves on local file systems, also on those that lack some of the calls: FUSE,
NFS, FAT.

Where a call is not supported the next best one takes its place, and `told` gets a sentence on what
that means. docs/store.md says what is left of each guarantee.

Locks are those of the system, on folders themselves. Lock files, such as those of `filelock`, would
not do: a job's folder holds what the job has written and nothing else; a scratch folder is removed
by whoever has its lock; a reader looks whether a folder is held without taking it, also where it
may not write; and without locks (NFS, FUSE) the work goes on, with a warning.
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
"""How file systems say that they lack a call, or that it does not work between these two files."""

# A lock on a folder of NFS: it would have to be open for writing, which no folder can be.
_NO_LOCK = NOT_SUPPORTED | {errno.EBADF, errno.EINVAL}
_NO_RENAME = NOT_SUPPORTED | {errno.EINVAL}
_NO_SYNC = NOT_SUPPORTED | {errno.EINVAL}
_LOOK_S, _LOOK_PAUSE_S = 0.2, 0.02
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


@contextmanager
def locked(folder: Path, told: Told, *, wait: bool = False) -> Iterator[bool | None]:
    """Lock a folder for a while; whoever is killed lets go of it.

    Args:
        wait: until whoever has it lets go.

    Yields: whether it is ours; None where the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield lock(descriptor, str(folder), told, wait=wait)
    finally:
        os.close(descriptor)


def lock(descriptor: int, where: str, told: Told, *, wait: bool = False) -> bool | None:
    """Lock an open folder until it is closed, or its process ends; see `locked`."""
    try:
        _lock(descriptor, wait)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCK:
            raise
        told(
            f"{where} cannot be locked: its file system has no locks ({error.strerror}); make sure that only one process uses it"
        )
        return None
    return True


def _lock(descriptor: int, wait: bool) -> None:
    for pause_s in pauses(_LOOK_S, _LOOK_PAUSE_S):  # whoever looks whether it is locked has it for an instant
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            if not pause_s:
                raise
            time.sleep(pause_s)
        else:
            return


def is_locked(folder: Path) -> bool | None:
    """Whether somebody has locked a folder; None where nobody can tell: it is not there, or its
    file system has no locks.
    """
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
    """Have the bytes of an open file on disk, and let go of its cached pages, as far as the file
    system can.
    """
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        told(
            f"{where} cannot be synced: its file system does not support it ({error.strerror}); it is on disk when it is"
        )


def move(local: Path, target: Path, told: Told) -> None:
    """Move a file to where nothing is.

    Raises:
        FileExistsError: something is there.
    """
    try:
        os.link(local, target)  # it fails where a rename would overwrite
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        if error.errno not in (errno.EXDEV, errno.EMLINK):
            told(
                f"{target.parent} has no hard links ({error.strerror}): "
                "objects are moved into place by a rename that does not overwrite"
            )
            with suppress(_RenameMissing):
                _rename_noreplace(local, target)
                return
        _copy(local, target, told)
    local.unlink()


def _copy(local: Path, target: Path, told: Told) -> None:
    """Copy under a name of its own, because the file may come from another file system, then
    move that.
    """
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
            f"{target.parent} has no rename that does not overwrite ({error.strerror}): objects are reserved by an empty file "
            "first; one that a crash leaves empty has to be removed by hand"
        )
        with target.open("xb"):
            pass
        partial.replace(target)


class _RenameMissing(OSError):
    """The file system has no rename that fails where something is."""


def _rename_noreplace(local: Path, target: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform != "linux" or not hasattr(libc, "renameat2"):
        raise _RenameMissing(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(_AT_FDCWD, os.fsencode(local), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        kind = _RenameMissing if number in _NO_RENAME else OSError
        raise kind(number, os.strerror(number), str(local), None, str(target))
