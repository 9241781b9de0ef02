"""The code that a job brought, in the store."""

import hashlib

from fedpool.bundle import MAX_ZIP_BYTES
from fedpool.errors import IntegrityError
from fedpool.messages import NamedCode
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.user_code import Code


def stored_code(job_id: str, store: Store, named: NamedCode) -> Code:
    """The code that a job brought.

    Raises:
        IntegrityError: it is missing or too large, or doesn't match its hash.
    """
    path = JobPaths(job_id).code(named.sha256)
    try:
        data = store.read_bytes(path, MAX_ZIP_BYTES)
    except FileNotFoundError:
        raise IntegrityError(f"{store.full(path)} is missing") from None
    if hashlib.sha256(data).hexdigest() != named.sha256:
        raise IntegrityError(f"{store.full(path)} does not match the hash in its name")
    return Code(named.modules, named.sha256, data)
