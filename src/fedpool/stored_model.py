"""An initial model that is already in a store: only its header is read until the rest is needed."""

import hashlib
import tempfile
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpool.arrays import load_arrays
from fedpool.errors import IntegrityError
from fedpool.initial import InitialModel
from fedpool.inspection import not_finite_names
from fedpool.store import Store
from fedpool.tensor_stream import Writable
from fedpool.tensors import Digest

_CHUNK_BYTES = 16 << 20


class StoredModel(InitialModel):
    """The tensors of a safetensors object.

    Its bytes are checked against the digest when they are used, not before.

    Args:
        digest: the digest in the object's record.
        may_have_holes: names of the tensors that may contain infinity; None: all.

    Raises:
        FileNotFoundError: there is no such object.
        IntegrityError: the object has no valid safetensors header for its size.
    """

    def __init__(self, store: Store, path: str, digest: Digest, may_have_holes: Collection[str] | None) -> None:
        # InitialModel's __init__ isn't called, because it holds a file of its own open.
        self.spec = store.tensors(path, digest.size).spec
        self.digest = digest
        self._store = store
        self._path = path
        self._may_have_holes = may_have_holes

    @cached_property
    def holes(self) -> frozenset[str]:
        """Names of the tensors that contain NaN or infinity; reads those that may."""
        reader = self._store.tensors(self._path, self.digest.size)
        return frozenset(not_finite_names(reader, self._store.block_elements, self._may_have_holes))

    @property
    def params(self) -> Mapping[str, Any]:
        """name -> torch tensor, memory-mapped.

        Raises:
            IntegrityError: the object doesn't match its record.
        """
        with tempfile.TemporaryDirectory(prefix="fedpool-") as folder:
            return load_arrays(self._store.fetch(self._path, Path(folder), self.digest), "torch")

    def write_to(self, file: Writable) -> None:
        """Copy the object's bytes.

        Raises:
            IntegrityError: the object doesn't match its record.
        """
        found = hashlib.sha256()
        for start in range(0, self.digest.size, _CHUNK_BYTES):
            chunk = self._store.read_range(self._path, start, min(start + _CHUNK_BYTES, self.digest.size))
            found.update(chunk)
            file.write(chunk)
        if found.hexdigest() != self.digest.sha256:
            raise IntegrityError(
                f"{self._store.full(self._path)} differs from its manifest: "
                f"sha256 {found.hexdigest()}, expected {self.digest.sha256}"
            )
