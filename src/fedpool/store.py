"""The store: a job's objects in any fsspec file system, written atomically and never overwritten.

An object exists once its manifest does: write the object, then the JSON with its sha256 and size.
If the backend supports it (local files; S3 with conditional writes), exclusive creation guards
against two writers, but never as the only guard. `fedpool.paths` decides where objects are.
"""

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from fedpool import exclusive
from fedpool.backend import Backend
from fedpool.digest import check_digest
from fedpool.download import download
from fedpool.errors import IntegrityError, StoreError
from fedpool.local_file import LocalFile, object_size, open_object, remove_object
from fedpool.refusals import explained
from fedpool.tensors import MAX_HEADER_BYTES, Digest, ReadRange, TensorReader
from fedpool.upload import Upload

_LARGE_BYTES = 16 << 20
_OPEN_FILES = 64


def to_json(value: Mapping[str, Any]) -> bytes:
    """The JSON format of the store: sorted keys, indented by two, no NaN, a newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


class Store(Backend):
    """A job's object storage: any fsspec URL.

    Args:
        url: a folder or an fsspec URL such as `s3://bucket/prefix`.
        storage_options: passed to fsspec; credentials belong here or in the environment, never in a
            recipe.

    Raises:
        ConfigError: fsspec has no file system for this URL, or the file system's package is
            missing.

    Apart from `FileNotFoundError` for a missing object, methods raise `StoreError`s: `StoreRefused`
    at once if waiting wouldn't help, others once the store has failed for `patience_s`. In a local
    store, whatever is not a regular file, or in a folder that is a link, is an `IntegrityError`;
    see `fedpool.local_file`.
    """

    def __init__(self, url: str | Path, **storage_options: Any) -> None:
        super().__init__(url, **storage_options)
        self._is_conditional = self.is_s3
        # Local: 512 KiB of float32, which fits a processor's cache, and few enough blocks that
        # threads don't wait for the interpreter lock. Remote: enough to make a request worthwhile.
        # Both are multiples of `arrays.CHUNK_ELEMENTS`.
        self.block_elements = 1 << 17 if self.is_local else 1 << 22
        self._may_stay_open = threading.Semaphore(_OPEN_FILES)

    def exists(self, path: str) -> bool:
        """Whether there is an object at path, or anything else.

        Raises:
            StoreError: the store doesn't answer.
        """
        if self.is_local:
            return os.path.lexists(self.full(path))
        with self.errors(path):
            return self.is_there(self.full(path))

    @contextmanager
    def held(self, path: str) -> Iterator[None]:
        """Hold a local store's folder against other processes; a killed process releases it.

        Raises:
            StoreError: another process holds it.
        """
        if not self.is_local:  # object storage has no locks
            yield
            return
        with ExitStack() as stack:
            with self.errors(path, "written"):
                Path(self.full(path)).mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(exclusive.locked(Path(self.full(path)), self.say))
            if held is False:
                raise StoreError(f"{self.full(path)} is in use: another process is running this job")
            yield

    def is_held(self, path: str) -> bool | None:
        """Whether a process holds a folder (see `held`); None if the store can't tell."""
        return exclusive.is_locked(Path(self.full(path))) if self.is_local else None

    def remove(self, path: str) -> None:
        """Remove an object, if it exists: nothing refers to it, or its owner no longer needs it.

        What a link stands for stays: it isn't the job's.
        """
        with suppress(FileNotFoundError, IntegrityError), self.errors(path, "removed"):
            if self.is_local:
                remove_object(self.folder, path)
            else:
                self.fs.rm_file(self.full(path))

    def size(self, path: str) -> int:
        """Size of an object in bytes; raises `FileNotFoundError` if there is none."""
        if self.is_local:
            with self.errors(path):
                return object_size(self.folder, path)
        return self.patiently(path, lambda: int(self.fs.info(self.full(path))["size"]))

    def names(self, path: str) -> list[str]:
        """Sorted names of a folder's entries; empty if the folder doesn't exist."""
        with suppress(FileNotFoundError), self.errors(path):
            if self.is_local:  # a frequent call, and cheaper than with fsspec
                with os.scandir(self.full(path)) as entries:
                    return sorted(entry.name for entry in entries)
            return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in self.fs.ls(self.full(path), detail=False))
        return []

    def tree(self, path: str) -> set[str]:
        """Paths of all objects below a folder, relative to it; empty if there is no folder.

        Usually takes one request.

        Raises:
            StoreError: the store doesn't answer.
        """
        folder = self.full(path)
        with self.errors(path):
            if self.is_local:
                return {f"{parent}/{file}"[len(folder) + 1 :] for parent, _, files in os.walk(folder) for file in files}
            return {found.partition(f"{folder}/")[2] for found in self.fs.find(folder)}

    def open(self, path: str) -> IO[bytes]:
        """A seekable binary file. The caller must check its hash before trusting it."""
        with self.errors(path):
            if self.is_local:
                return os.fdopen(open_object(self.folder, path), "rb")
            file: IO[bytes] = self.fs.open(self.full(path), "rb")
            return file

    def read_bytes(self, path: str, limit: int | None = None) -> bytes:
        """An object's bytes, unchecked.

        Args:
            limit: the most bytes to read; None: all that there are.

        Raises:
            FileNotFoundError: there is no such object.
            IntegrityError: it has more bytes than that.
        """
        if limit is not None and (size := self.size(path)) > limit:
            raise IntegrityError(f"{self.full(path)} has {size} bytes, but only {limit} are allowed")
        if self.is_local:
            with self.open(path) as file:
                return file.read()
        return self.patiently(path, lambda: bytes(self.fs.cat_file(self.full(path))))

    def tensors(self, path: str, size: int, *, max_header: int = MAX_HEADER_BYTES) -> TensorReader:
        """Block-wise access to a safetensors object of `size` bytes."""
        read: ReadRange = partial(self.read_range, path)
        if self.is_local:
            with self.errors(path):
                read = LocalFile(partial(open_object, self.folder, path), self._may_stay_open)
        return TensorReader(read, size, where=self.full(path), max_header=max_header)

    def read_range(self, path: str, start: int, stop: int) -> bytearray | memoryview:
        """An object's bytes from `start` to `stop`, or to its end; unchecked."""
        if stop == start:
            return bytearray()
        if self.is_local:
            with self.errors(path):
                return LocalFile(partial(open_object, self.folder, path))(start, stop)
        return self.patiently(path, lambda: bytearray(self.fs.cat_file(self.full(path), start=start, end=stop)))

    def read_json(self, path: str, limit: int | None = None) -> dict[str, Any]:
        """A JSON object; see `read_bytes` for `limit`.

        Raises:
            FileNotFoundError: there is no such object.
            IntegrityError: it isn't a JSON object.
        """
        return self.json_of(path, self.read_bytes(path, limit))

    def json_of(self, path: str, data: bytes) -> dict[str, Any]:
        """Parse an object's bytes as a JSON object.

        Raises:
            IntegrityError: they aren't one.
        """
        if not data:
            raise IntegrityError(
                f"{self.full(path)} is empty, because its writer was killed on a file system without hard links: remove it"
            )
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise IntegrityError(f"{self.full(path)} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise IntegrityError(f"{self.full(path)} is not a JSON object")
        return value

    def write_json(self, path: str, value: Mapping[str, Any]) -> Digest:
        """Write JSON atomically; returns its digest.

        Raises:
            StoreError: the object already exists.
        """
        data = to_json(value)
        self.write_bytes(path, data)
        return Digest(hashlib.sha256(data).hexdigest(), len(data))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write an object atomically.

        Raises:
            StoreError: the object already exists.
        """
        with self.staged(path) as file:
            file.write(data)

    @contextmanager
    def staged(self, path: str) -> Iterator[IO[bytes]]:
        """A local file that becomes the object when the block ends; discarded if it raises."""
        with self._scratch() as folder:
            local = Path(folder) / "object"
            with explained(self.full(path) if self.is_local else folder), local.open("wb") as file:
                yield file
            self.adopt(local, path)

    def adopt(self, local: Path, path: str) -> None:
        """Move a local file into the store, exclusively.

        Raises:
            StoreError: the object already exists.
        """
        target = self.full(path)
        try:
            if self.is_local:
                with self.errors(path, "written"):
                    Path(target).parent.mkdir(parents=True, exist_ok=True)
                    exclusive.move(local, Path(target), self.say)
            else:
                upload = Upload(self, local, target)
                self._is_conditional = self.patiently(path, lambda: upload(conditional=self._is_conditional), "written")
                local.unlink()
        except FileExistsError:
            raise StoreError(f"{target} exists already, and objects are never overwritten: use a new job_id") from None

    def settle(self, path: str) -> None:
        """Flush a large local object to disk, and drop its cached pages.

        A round's objects are not read again soon. Left to the kernel, the updates of a large model
        would fill all memory with pages before any are written, and each new round would have to
        wait for fresh ones: with 4 updates of 300 MB a round, rounds took a third longer.
        """
        if not self.is_local or not hasattr(os, "posix_fadvise"):
            return
        with suppress(FileNotFoundError, IntegrityError), self.open(path) as file:
            if os.fstat(file.fileno()).st_size >= _LARGE_BYTES:
                with self.errors(path):
                    exclusive.sync(file.fileno(), self.url, self.say)

    @contextmanager
    def _scratch(self) -> Iterator[str]:
        # Next to the objects if the store is local, so that moving them into place is a link, not a
        # copy.
        parent = self.root if self.is_local else tempfile.gettempdir()
        with self.errors("", "written") if self.is_local else explained(parent):
            Path(parent).mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix=".fedpool-", dir=parent)
        with scratch as folder:
            yield folder

    def fetch(
        self, path: str, folder: Path, digest: Digest | None = None, *, again: bool = False, copy: bool = False
    ) -> Path:
        """A local file with the object's bytes: a local store's own file, or a copy in folder.

        Args:
            digest: the expected digest; None to skip the check.
            again: keep a copy that is already in folder, if it has that digest.
            copy: copy a local store's file, too.

        Raises `FileNotFoundError` and, if the bytes don't have the digest, `IntegrityError`.
        """
        if self.is_local and not copy:
            with self.open(path) as file:
                if digest is not None:
                    check_digest(file, digest, where=self.full(path))
            return Path(self.full(path))
        local = folder / path.replace("/", "_")
        download(self, path, local, digest, again=again)
        return local
