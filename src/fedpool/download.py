"""How a remote object becomes a local file, though requests fail and some bring half of it."""

from contextlib import suppress
from pathlib import Path

from fedpool.backend import Backend
from fedpool.digest import check_digest
from fedpool.errors import IntegrityError
from fedpool.refusals import explained
from fedpool.tensors import Digest

_FETCHES = 3


def download(backend: Backend, path: str, local: Path, digest: Digest | None, *, again: bool) -> None:
    """Copy an object of a remote file system to a local file.

    Args:
        digest: that the bytes must have; None takes what comes.
        again: the file will do as it is, if it is there and has that digest.

    Raises:
        FileNotFoundError: there is no object.
        IntegrityError: the bytes differ from digest.
    """
    if again and digest is not None and local.exists():
        with suppress(IntegrityError), local.open("rb") as file:  # else it is fetched anew
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
        except IntegrityError:  # perhaps only half has come
            if left == 0:
                raise


def _get(backend: Backend, path: str, local: Path) -> None:
    with explained(local):
        backend.fs.get_file(backend.full(path), str(local))
