"""Download a remote object to a local file, even if requests fail and data is truncated."""

from contextlib import suppress
from pathlib import Path

from fedpool.backend import Backend
from fedpool.digest import check_digest
from fedpool.errors import IntegrityError
from fedpool.refusals import explained
from fedpool.tensors import Digest

_FETCHES = 3


def download(backend: Backend, path: str, local: Path, digest: Digest | None, *, again: bool) -> None:
    """Download an object.

    Args:
        backend: the remote file system.
        path: path of the object.
        local: the local file.
        digest: the expected digest; None to skip the check.
        again: keep an existing local file if it has the expected digest.

    Raises:
        FileNotFoundError: there is no object.
        IntegrityError: the bytes don't have the expected digest.
    """
    if again and digest is not None and local.exists():
        with suppress(IntegrityError), local.open("rb") as file:  # otherwise download it again
            check_digest(file, digest, where=str(local))
            return
    for left in reversed(range(_FETCHES)):
        backend.patiently(path, lambda: _get(backend, path, local))
        if digest is None:
            return
        try:
            with local.open("rb") as file:
                check_digest(file, digest, where=backend.full(path))
            return
        except IntegrityError:  # the data may have been truncated
            if left == 0:
                raise


def _get(backend: Backend, path: str, local: Path) -> None:
    with explained(local):
        backend.fs.get_file(backend.full(path), str(local))
