"""The store: a job's objects in any fsspec file system. An object is written whole or not at all, and none is overwritten.

An object exists when its manifest does: write the object, then the JSON that holds its sha256 and size. Exclusive creation
guards against two writers where the backend can (local files; S3 with conditional writes) and is never the only guard. Where
objects lie is the matter of `fedpool.paths`.
"""

import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fedpool import exclusive, s3
from fedpool.errors import ConfigError, IntegrityError, StoreError, StoreRefused
from fedpool.local_file import LocalFile
from fedpool.loopback import bypass_proxies
from fedpool.patience import pauses
from fedpool.refusals import Doing, explained, refusal
from fedpool.tensors import MAX_HEADER_BYTES, Digest, TensorReader

WRITE_PATIENCE_S = 60.0
_FETCHES = 3
T = TypeVar("T")
_LARGE_BYTES = 16 << 20
_OPEN_FILES = 64
_CHUNK_BYTES = 16 << 20
_LOG = logging.getLogger("fedpool.store")


def to_json(value: Mapping[str, Any]) -> bytes:
    """The one form in which JSON lies in the store: sorted keys, two spaces, strict (no NaN), a newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


class Store:
    """A job's object storage: any fsspec URL.

    Args:
        url: a folder or an fsspec URL such as `s3://bucket/prefix`.
        storage_options: passed to fsspec; credentials belong here or in the environment, never in a recipe.

    Raises:
        ConfigError: there is no file system for such a URL, or its package is missing.

    What its methods raise, beside the `FileNotFoundError` of an object that is not there, are `StoreError`s: `StoreRefused` at
    once where waiting would not help, others once the store has failed for `patience_s`.
    """

    def __init__(self, url: str | Path, **storage_options: Any) -> None:
        protocol = fsspec.core.split_protocol(str(url))[0] or "file"
        if protocol not in ("file", "local"):
            # Others write here too: what was not there a moment ago may be there now.
            storage_options = {"use_listings_cache": False, **storage_options}
            bypass_proxies()
        if protocol in s3.PROTOCOLS:
            storage_options = s3.with_defaults(storage_options)
        self.storage_options: Mapping[str, Any] = storage_options
        """How it was opened; they may hold secrets."""
        try:
            self.fs, self.root = fsspec.core.url_to_fs(str(url), **storage_options)
        except (ImportError, ValueError) as error:
            hint = "pip install 'fedpool[s3]'" if protocol in s3.PROTOCOLS else "correct it, or install what it needs"
            raise ConfigError(f"the store {str(url)!r} cannot be opened: {error}; {hint}") from error
        self.patience_s = WRITE_PATIENCE_S
        """How long a remote store may refuse before a write fails."""
        self.url: str = self.fs.unstrip_protocol(self.root)
        self._is_conditional = protocol in s3.PROTOCOLS
        self.is_local = isinstance(self.fs, LocalFileSystem)
        # Local: 512 KiB of float32, which a processor's cache holds, and few enough that threads do not wait for the
        # interpreter's lock. Remote: as much as makes a request worth its while. Both are multiples of `arrays.CHUNK_ELEMENTS`.
        self.block_elements = 1 << 17 if self.is_local else 1 << 22
        self._may_stay_open = threading.Semaphore(_OPEN_FILES)
        self._said: set[str] = set()

    def full(self, path: str) -> str:
        """The path as the file system, or a person, knows it."""
        return f"{self.root.rstrip('/')}/{path}"

    def address(self, path: str) -> str:
        """The path as anybody can open it: of a local store the file's, of any other a URL."""
        return self.full(path) if self.is_local else str(self.fs.unstrip_protocol(self.full(path)))

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
        with ExitStack() as stack:
            with self._errors(path, "written"):
                Path(self.full(path)).mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(exclusive.locked(Path(self.full(path)), self._say))
            if held is False:
                raise StoreError(f"{self.full(path)} is in use: another process runs this job")
            yield

    def _say(self, text: str) -> None:
        """Log what a user should know about the store's file system, once."""
        if text not in self._said:
            self._said.add(text)
            _LOG.warning("%s", text)

    def is_held(self, path: str) -> bool | None:
        """Whether somebody holds a folder (see `held`); None where nobody can tell."""
        return exclusive.is_locked(Path(self.full(path))) if self.is_local else None

    def remove(self, path: str) -> None:
        """Remove an object, if it is there: one that nothing names, or that its owner does not want any more."""
        with suppress(FileNotFoundError), self._errors(path, "removed"):
            self.fs.rm_file(self.full(path))

    @contextmanager
    def _errors(self, path: str, doing: Doing = "read") -> Iterator[None]:
        """Make what a backend raises, in classes of its own, an error of ours that names the object and, if known, the remedy."""
        full = self.address(path)
        try:
            yield
        except (StoreError, FileExistsError):
            raise
        except Exception as error:
            reason = error if self.is_local else s3.with_reason(error, self.fs, self.root)
            if refused := refusal(reason, full, doing):
                # fsspec would hand out this file system, and its credentials, for as long as the process lives.
                type(self.fs).clear_instance_cache()
                raise refused from None  # the sentence says it; the backend's tracebacks would bury it
            if isinstance(error, FileNotFoundError) and doing != "written":
                raise
            raise StoreError(f"{full} cannot be {doing}: {type(error).__name__}: {error}") from error

    def _patiently(self, path: str, work: Callable[[], T], doing: Doing = "read") -> T:
        """Have a remote store do something again and again while it fails; a local one, and one that refuses, tell at once."""
        told = False
        for pause_s in pauses(0.0 if self.is_local else self.patience_s, 0.2, 5.0):
            try:
                with self._errors(path, doing):
                    return work()
            except (FileNotFoundError, FileExistsError, StoreRefused):
                raise
            except StoreError as error:
                if not pause_s:
                    raise
                if not told:
                    _LOG.warning("%s: retrying for up to %g s", error, self.patience_s)
                told = True
                time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    def size(self, path: str) -> int:
        """Size of an object in bytes; raises `FileNotFoundError` when there is none."""
        return self._patiently(path, lambda: int(self.fs.info(self.full(path))["size"]))

    def names(self, path: str) -> list[str]:
        """Sorted names of what lies in a folder; empty when the folder does not exist."""
        with suppress(FileNotFoundError), self._errors(path):
            if self.is_local:  # cheaper than through fsspec, and asked often
                with os.scandir(self.full(path)) as entries:
                    return sorted(entry.name for entry in entries)
            return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in self.fs.ls(self.full(path), detail=False))
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
        with self._errors(path):
            file: IO[bytes] = self.fs.open(self.full(path), "rb")
            return file

    def read_bytes(self, path: str) -> bytes:
        """An object's bytes; raises `FileNotFoundError` when there is none. The caller checks them before trusting them."""
        return self._patiently(path, lambda: bytes(self.fs.cat_file(self.full(path))))

    def tensors(self, path: str, size: int, *, max_header: int = MAX_HEADER_BYTES) -> TensorReader:
        """Block-wise access to a safetensors object of `size` bytes."""
        full = self.full(path)
        read = LocalFile(full, self._may_stay_open) if self.is_local else partial(self.read_range, path)
        return TensorReader(read, size, where=full, max_header=max_header)

    def read_range(self, path: str, start: int, stop: int) -> bytearray | memoryview:
        """An object's bytes from `start` to `stop`, as far as it has them. The caller checks them before trusting them."""
        if stop == start:
            return bytearray()
        if self.is_local:
            return LocalFile(self.full(path))(start, stop)
        return self._patiently(path, lambda: bytearray(self.fs.cat_file(self.full(path), start=start, end=stop)))

    def read_json(self, path: str) -> dict[str, Any]:
        """A JSON object.

        Raises:
            FileNotFoundError: there is none.
            IntegrityError: it is not a JSON object.
        """
        return self.json_of(path, self.read_bytes(path))

    def json_of(self, path: str, data: bytes) -> dict[str, Any]:
        """The JSON object that an object's bytes are.

        Raises:
            IntegrityError: they are none.
        """
        if not data:
            raise IntegrityError(
                f"{self.full(path)} is empty: whoever wrote it was killed on a file system without hard links; remove it"
            )
        try:
            value = json.loads(data)
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
            with explained(self.full(path) if self.is_local else folder), local.open("wb") as file:
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
                with self._errors(path, "written"):
                    Path(target).parent.mkdir(parents=True, exist_ok=True)
                    exclusive.move(local, Path(target), self._say)
            else:
                self._put(local, path)
                local.unlink()
        except FileExistsError:
            raise StoreError(
                f"{target} exists already, and nothing in the store is overwritten: use a new job_id"
            ) from None

    def _put(self, local: Path, path: str) -> None:
        """Write a remote object, again and again while the store fails; what our own try left there is no other's."""
        target = self.full(path)
        tried = False

        def put() -> None:
            nonlocal tried
            if self.fs.exists(target):
                if not tried or not self._holds_beginning_of(local, target):
                    raise FileExistsError(target)
                if self.fs.info(target)["size"] == local.stat().st_size:
                    return
                self.fs.rm_file(target)  # our own, and cut short
            tried = True
            try:
                self._is_conditional = s3.put_new(self.fs, local, target, conditional=self._is_conditional)
            except FileExistsError:
                # Another writer was faster, or the answer to a request of ours was lost, and the backend has repeated it.
                if self.fs.info(target)["size"] != local.stat().st_size or not self._holds_beginning_of(local, target):
                    raise

        self._patiently(path, put, "written")

    def _holds_beginning_of(self, local: Path, target: str) -> bool:
        """Whether a remote object is what our own try may have left: another coordinator's record may be as long as ours."""
        size = int(self.fs.info(target)["size"])
        if size > local.stat().st_size:
            return False
        with local.open("rb") as file:
            for start in range(0, size, _CHUNK_BYTES):
                ours = file.read(min(_CHUNK_BYTES, size - start))
                theirs = self.fs.cat_file(target, start=start, end=start + len(ours))
                if len(theirs) < len(ours):
                    raise OSError(f"{target} was cut short while it was read")
                if theirs != ours:
                    return False
        return True

    def settle(self, path: str) -> None:
        """Have a large local object on disk now, and let go of its cached pages.

        What a round leaves behind is not read again soon. Left to the kernel, the updates of a large model would take all
        memory for their pages before anything is written, and each new round would pay for fresh ones: with 4 updates of
        300 MB a round, rounds took a third longer.
        """
        if not self.is_local or not hasattr(os, "posix_fadvise"):
            return
        with suppress(FileNotFoundError), self._errors(path), Path(self.full(path)).open("rb") as file:
            if os.fstat(file.fileno()).st_size >= _LARGE_BYTES:
                exclusive.sync(file.fileno(), self.url, self._say)

    @contextmanager
    def _scratch(self) -> Iterator[str]:
        # Beside the objects where the store is local, so that the move into place is a link and not a copy.
        parent = self.root if self.is_local else tempfile.gettempdir()
        with self._errors("", "written") if self.is_local else explained(parent):
            Path(parent).mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix=".fedpool-", dir=parent)
        with scratch as folder:
            yield folder

    def fetch(self, path: str, folder: Path, digest: Digest | None = None, *, again: bool = False) -> Path:
        """A local file with the object's bytes: the object itself where the store is local, else a copy in folder.

        Args:
            digest: that the bytes must have.
            again: a copy that lies in folder from before, and has that digest, will do.

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
            if again and digest is not None and local.exists():
                with suppress(IntegrityError), local.open("rb") as file:  # else it is fetched anew
                    check_digest(file, digest, where=str(local))
                    return local
        for left in reversed(range(1 if self.is_local else _FETCHES)):
            if not self.is_local:
                self._patiently(path, lambda: self._get(path, local))
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

    def _get(self, path: str, local: Path) -> None:
        with explained(local):
            self.fs.get_file(self.full(path), str(local))


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
