"""The store: a job's objects in any fsspec file system. An object is written whole or not at all, and none is overwritten.

An object exists when its manifest does: write the object, then the JSON that holds its sha256 and size. Exclusive creation
guards against two writers where the backend can (local files; S3 with conditional writes) and is never the only guard. Where
objects lie is the matter of `fedpool.paths`.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fedpool.errors import IntegrityError, StoreError
from fedpool.local_file import LocalFile
from fedpool.tensors import MAX_HEADER_BYTES, Digest, TensorReader

WRITE_PATIENCE_S = 60.0
_FETCHES = 3
T = TypeVar("T")
_LARGE_BYTES = 16 << 20
_OPEN_FILES = 64


def to_json(value: Mapping[str, Any]) -> bytes:
    """The one form in which JSON lies in the store: sorted keys, two spaces, strict (no NaN), a newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


class Store:
    """A job's object storage: any fsspec URL.

    Args:
        url: a folder or an fsspec URL such as `s3://bucket/prefix`.
        storage_options: passed to fsspec; credentials belong here or in the environment, never in a recipe.
    """

    def __init__(self, url: str | Path, **storage_options: Any) -> None:
        protocol = fsspec.core.split_protocol(str(url))[0] or "file"
        if protocol not in ("file", "local"):
            # Others write here too: what was not there a moment ago may be there now.
            storage_options = {"use_listings_cache": False, **storage_options}
        self.fs, self.root = fsspec.core.url_to_fs(str(url), **storage_options)
        self.patience_s = WRITE_PATIENCE_S
        """How long a remote store may refuse before a write fails."""
        self.url: str = self.fs.unstrip_protocol(self.root)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        # Local: 512 KiB of float32, which a processor's cache holds, and few enough that threads do not wait for the
        # interpreter's lock. Remote: as much as makes a request worth its while. Both are multiples of `arrays.CHUNK_ELEMENTS`.
        self.block_elements = 1 << 17 if self.is_local else 1 << 22
        self._may_stay_open = threading.Semaphore(_OPEN_FILES)

    def full(self, path: str) -> str:
        """The path as the file system, or a person, knows it."""
        return f"{self.root.rstrip('/')}/{path}"

    def exists(self, path: str) -> bool:
        """Whether there is an object at path.

        Raises:
            StoreError: the store does not answer.
        """
        with self._errors(path):
            return bool(self.fs.exists(self.full(path)))

    @contextmanager
    def held(self, path: str) -> Iterator[None]:
        """Hold a folder of a local store, so that no other process takes it for its own; one that is killed lets go of it.

        Raises:
            StoreError: somebody else holds it.
        """
        if not self.is_local:  # there is nothing like it in object storage
            yield
            return
        Path(self.full(path)).mkdir(parents=True, exist_ok=True)
        folder = os.open(self.full(path), os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(f"{self.full(path)} is in use: another process runs this job") from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # some network file systems have no locks
                    raise
            yield
        finally:
            os.close(folder)

    def remove(self, path: str) -> None:
        """Remove an object, if it is there: one that nothing names, or that its owner does not want any more."""
        with self._errors(path), suppress(FileNotFoundError):
            self.fs.rm_file(self.full(path))

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Make what a backend raises, in classes of its own, an error of ours that names the object."""
        try:
            yield
        except (OSError, StoreError):
            raise
        except Exception as error:
            raise StoreError(f"{self.full(path)} cannot be reached: {type(error).__name__}: {error}") from error

    def _patiently(self, path: str, read: Callable[[], T]) -> T:
        """Read from a remote store again and again while it fails, as long as a write would; a local one tells at once."""
        deadline = time.monotonic() + (0.0 if self.is_local else self.patience_s)
        pause = 0.2
        while True:
            try:
                with self._errors(path):
                    return read()
            except (FileNotFoundError, PermissionError):
                raise
            except (OSError, StoreError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, 5.0)

    def size(self, path: str) -> int:
        """Size of an object in bytes; raises `FileNotFoundError` when there is none."""
        return self._patiently(path, lambda: int(self.fs.info(self.full(path))["size"]))

    def names(self, path: str) -> list[str]:
        """Sorted names of what lies in a folder; empty when the folder does not exist."""
        try:
            if self.is_local:  # cheaper than through fsspec, and asked often
                with os.scandir(self.full(path)) as entries:
                    return sorted(entry.name for entry in entries)
            return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in self.fs.ls(self.full(path), detail=False))
        except FileNotFoundError:
            return []

    def tree(self, path: str) -> set[str]:
        """Paths of all objects below a folder, relative to it; empty when the folder does not exist. One request, mostly.

        Raises:
            StoreError: the store does not answer.
        """
        folder = self.full(path)
        with self._errors(path):
            if self.is_local:
                return {f"{parent}/{file}"[len(folder) + 1 :] for parent, _, files in os.walk(folder) for file in files}
            return {found.partition(f"{folder}/")[2] for found in self.fs.find(folder)}

    def open(self, path: str) -> IO[bytes]:
        """A binary file to read, with seek. The caller checks its hash against a manifest before trusting it."""
        file: IO[bytes] = self.fs.open(self.full(path), "rb")
        return file

    def read_bytes(self, path: str) -> bytes:
        """An object's bytes; raises `FileNotFoundError` when there is none. The caller checks them before trusting them."""
        return self._patiently(path, lambda: bytes(self.fs.cat_file(self.full(path))))

    def tensors(self, path: str, size: int, *, max_header: int = MAX_HEADER_BYTES) -> TensorReader:
        """Block-wise access to a safetensors object of `size` bytes."""
        full = self.full(path)
        if self.is_local:
            return TensorReader(LocalFile(full, self._may_stay_open), size, where=full, max_header=max_header)

        def read_remote(start: int, stop: int) -> bytearray:
            if stop == start:
                return bytearray()
            return self._patiently(path, lambda: bytearray(self.fs.cat_file(full, start=start, end=stop)))

        return TensorReader(read_remote, size, where=full, max_header=max_header)

    def read_json(self, path: str) -> dict[str, Any]:
        """A JSON object.

        Raises:
            FileNotFoundError: there is none.
            IntegrityError: it is not a JSON object.
        """
        try:
            value = json.loads(self.read_bytes(path))
        except (ValueError, RecursionError) as error:
            raise IntegrityError(f"{self.full(path)} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise IntegrityError(f"{self.full(path)} is not a JSON object")
        return value

    def write_json(self, path: str, value: Mapping[str, Any]) -> Digest:
        """Write JSON whole or not at all; returns its digest.

        Raises:
            StoreError: there is an object already.
        """
        data = to_json(value)
        self.write_bytes(path, data)
        return Digest(hashlib.sha256(data).hexdigest(), len(data))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write an object whole or not at all.

        Raises:
            StoreError: there is an object already.
        """
        with self.staged(path) as file:
            file.write(data)

    @contextmanager
    def staged(self, path: str) -> Iterator[IO[bytes]]:
        """A local file to write; it becomes the object at path when the block ends, and vanishes when it raises."""
        with self._scratch() as folder:
            local = Path(folder) / "object"
            with local.open("wb") as file:
                yield file
            self.adopt(local, path)

    def adopt(self, local: Path, path: str) -> None:
        """Move a local file into the store, exclusively.

        Raises:
            StoreError: there is an object already.
        """
        target = self.full(path)
        try:
            if self.is_local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                _link(local, Path(target))
            else:
                self._put(local, target)
        except FileExistsError:
            raise StoreError(
                f"{target} exists already, and nothing in the store is overwritten: use a new job_id"
            ) from None
        local.unlink()

    def _put(self, local: Path, target: str) -> None:
        """Write a remote object, again and again while the store refuses; what our own try left there is no other's."""
        deadline = time.monotonic() + self.patience_s
        pause = 0.5
        tried = False
        while True:
            try:
                if self.fs.exists(target):
                    if not tried:
                        raise FileExistsError(target)
                    if self.fs.info(target)["size"] == local.stat().st_size:
                        return
                    self.fs.rm_file(target)  # our own, and cut short
                tried = True
                self.fs.put_file(str(local), target)
            except (FileExistsError, PermissionError):
                raise
            except Exception as error:  # each backend has errors of its own, and few are OSErrors
                if time.monotonic() > deadline:
                    raise StoreError(f"{target} cannot be written: {type(error).__name__}: {error}") from error
                time.sleep(pause)
                pause = min(2 * pause, 5.0)
            else:
                return

    def settle(self, path: str) -> None:
        """Have a large local object on disk now, and let go of its cached pages.

        What a round leaves behind is not read again soon. Left to the kernel, the updates of a large model would take all
        memory for their pages before anything is written, and each new round would pay for fresh ones: with 4 updates of
        300 MB a round, rounds took a third longer.
        """
        if not self.is_local or not hasattr(os, "posix_fadvise"):
            return
        with suppress(FileNotFoundError), Path(self.full(path)).open("rb") as file:
            if os.fstat(file.fileno()).st_size >= _LARGE_BYTES:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @contextmanager
    def _scratch(self) -> Iterator[str]:
        # Beside the objects where the store is local, so that the move into place is a link and not a copy.
        if self.is_local:
            Path(self.root).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fedpool-", dir=self.root if self.is_local else None) as folder:
            yield folder

    def fetch(self, path: str, folder: Path, digest: Digest | None = None) -> Path:
        """A local file with the object's bytes: the object itself where the store is local, else a copy in folder.

        Raises:
            FileNotFoundError: there is no object.
            IntegrityError: the bytes differ from digest.
        """
        if self.is_local:
            local = Path(self.full(path))
            if not local.exists():
                raise FileNotFoundError(local)
        else:
            local = folder / path.replace("/", "_")
        for left in reversed(range(1 if self.is_local else _FETCHES)):
            if not self.is_local:
                self._patiently(path, lambda: self.fs.get_file(self.full(path), str(local)))
            if digest is None:
                break
            try:
                with local.open("rb") as file:
                    check_digest(file, digest, where=self.full(path))
                break
            except IntegrityError:  # of a remote object, perhaps only half has come
                if left == 0:
                    raise
        return local


def hash_file(file: IO[bytes]) -> Digest:
    """sha256 and size of a file from its beginning."""
    file.seek(0)
    digest = hashlib.sha256()
    size = 0
    while chunk := file.read(1 << 20):
        digest.update(chunk)
        size += len(chunk)
    return Digest(digest.hexdigest(), size)


def check_digest(file: IO[bytes], expected: Digest, *, where: str) -> None:
    """Raise `IntegrityError` unless the file's bytes are those that the manifest describes."""
    found = hash_file(file)
    if found != expected:
        raise IntegrityError(
            f"{where} differs from its manifest: {found.size} bytes with sha256 {found.sha256}, "
            f"expected {expected.size} bytes with {expected.sha256}"
        )


def _link(local: Path, target: Path) -> None:
    """Move exclusively: a hard link fails where a rename would overwrite."""
    try:
        os.link(local, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP):
            raise
        # Another file system, or one without hard links: copy under a name of its own, then link or create.
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            shutil.copyfile(local, partial)
            try:
                os.link(partial, target)
            except OSError as again:
                if again.errno not in (errno.EPERM, errno.ENOTSUP):
                    raise
                with target.open("xb"):
                    pass
                partial.replace(target)
        finally:
            with suppress(FileNotFoundError):
                partial.unlink()
