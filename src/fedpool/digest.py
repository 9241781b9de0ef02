"""sha256 and size of files, and checks against a manifest."""

import hashlib
from typing import IO

from fedpool.errors import IntegrityError
from fedpool.tensors import Digest


def hash_file(file: IO[bytes]) -> Digest:
    """sha256 and size of a file, read from its start."""
    file.seek(0)
    digest = hashlib.sha256()
    size = 0
    while chunk := file.read(1 << 20):
        digest.update(chunk)
        size += len(chunk)
    return Digest(digest.hexdigest(), size)


def check_digest(file: IO[bytes], expected: Digest, *, where: str) -> None:
    """Raise `IntegrityError` if the file's bytes aren't those that the manifest describes."""
    found = hash_file(file)
    if found != expected:
        raise IntegrityError(mismatch(where, found, expected))


def mismatch(where: str, found: Digest, expected: Digest) -> str:
    """The sentence that an object isn't the one that its manifest describes."""
    return (
        f"{where} differs from its manifest: {found.size} bytes with sha256 {found.sha256}, "
        f"expected {expected.size} bytes with {expected.sha256}"
    )
