"""The file system of a store: opened from a URL, with errors translated and failures retried."""

import logging
import os.path
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fedpool import s3
from fedpool.errors import ConfigError, StoreError, StoreRefused
from fedpool.loopback import bypass_proxies
from fedpool.patience import pauses
from fedpool.refusals import Doing, refusal

PATIENCE_S = 60.0
_LOCAL = (None, "file", "local")
_SAME = {"s3a": "s3"}
T = TypeVar("T")
_LOG = logging.getLogger("fedpool.store")


def normal_url(url: str) -> str:
    """A store's URL in one form, for comparing two: nothing is opened.

    A folder becomes an absolute `file://` URL without `..`; a trailing slash does not count.
    """
    protocol, path = fsspec.core.split_protocol(url)
    if protocol in _LOCAL:
        return f"file://{os.path.abspath(os.path.expanduser(path))}"  # noqa: PTH100, PTH111  # paths may be hostile
    return f"{_SAME.get(protocol, protocol)}://{path.rstrip('/')}"


class Backend:
    """A folder in any fsspec file system.

    Args:
        url: a folder, or an fsspec URL such as `s3://bucket/prefix`.
        storage_options: passed to fsspec.

    Raises:
        ConfigError: fsspec has no file system for this URL, or the file system's package is
            missing.
    """

    def __init__(self, url: str | Path, **storage_options: Any) -> None:
        protocol = fsspec.core.split_protocol(str(url))[0] or "file"
        if protocol not in ("file", "local"):
            # Other processes write here too, so a cached listing may be out of date.
            storage_options = {"use_listings_cache": False, **storage_options}
            bypass_proxies()
        self.is_s3 = protocol in s3.PROTOCOLS
        if self.is_s3:
            storage_options = s3.with_defaults(storage_options)
        self.storage_options: Mapping[str, Any] = storage_options
        """The options that it was opened with. They may contain secrets."""
        try:
            self.fs, self.root = fsspec.core.url_to_fs(str(url), **storage_options)
        except (ImportError, ValueError) as error:
            hint = (
                "pip install 'fedpool[s3]'" if self.is_s3 else "correct the URL, or install the package that it needs"
            )
            raise ConfigError(f"the store {str(url)!r} cannot be opened: {error}; {hint}") from error
        self.patience_s = PATIENCE_S
        """How long a remote file system may fail before an error is raised."""
        self.url: str = self.fs.unstrip_protocol(self.root)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self._said: set[str] = set()

    def full(self, path: str) -> str:
        """The full path, as the file system and people know it."""
        return f"{self.folder}/{path}"

    @property
    def folder(self) -> str:
        """The folder or prefix that `path` is relative to."""
        return str(self.root).rstrip("/")

    def is_there(self, full: str) -> bool:
        """Whether the file system has an object at this full path."""
        return s3.is_there(self.fs, full) if self.is_s3 else bool(self.fs.exists(full))

    def address(self, path: str) -> str:
        """The path as anyone can open it: a file path for a local store, otherwise a URL."""
        return self.full(path) if self.is_local else str(self.fs.unstrip_protocol(self.full(path)))

    @contextmanager
    def errors(self, path: str, doing: Doing = "read") -> Iterator[None]:
        """Turn a backend's errors into fedpool's, which name the object and any known remedy."""
        full = self.address(path)
        try:
            yield
        except (StoreError, FileExistsError):
            raise
        except Exception as error:
            reason = error if self.is_local else s3.with_reason(error, self.fs, self.root)
            if refused := refusal(reason, full, doing):
                # fsspec would reuse this file system, and its credentials, for as long as the
                # process lives.
                type(self.fs).clear_instance_cache()
                raise refused from None  # the backend's tracebacks would bury the message
            if isinstance(error, FileNotFoundError) and doing != "written":
                raise
            raise StoreError(f"{full} cannot be {doing}: {type(error).__name__}: {error}") from error

    def patiently(self, path: str, work: Callable[[], T], doing: Doing = "read") -> T:
        """Retry a failing operation, unless the file system is local or refuses it."""
        told = False
        for pause_s in pauses(0.0 if self.is_local else self.patience_s, 0.2, 5.0):
            try:
                with self.errors(path, doing):
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

    def say(self, text: str) -> None:
        """Log a warning about the store's file system, once."""
        if text not in self._said:
            self._said.add(text)
            _LOG.warning("%s", text)
