"""Writing safetensors files: a stream from a spec and the tensors' bytes, hashed on the way."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, Protocol, Self

from fedpool.tensors import Digest, Spec, file_order


class Writable(Protocol):
    """The only file method that a stream of tensors needs."""

    def write(self, data: Any, /) -> Any:
        """Append bytes."""
        ...


_BATCH_BYTES = 4 << 20


class _Hashing:
    """A file that hashes a batch of bytes on a thread while the caller computes the next."""

    def __init__(self, file: Writable) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._batch, self._spare = bytearray(_BATCH_BYTES), bytearray(_BATCH_BYTES)
        self._filled = 0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="fedpool-hash")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()

    def write(self, data: memoryview, /) -> None:
        while data:
            count = min(len(data), _BATCH_BYTES - self._filled)
            self._batch[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == _BATCH_BYTES:
                self._hand_over()

    def close(self) -> Digest:
        self._hand_over()
        self._wait()
        return Digest(self._sha256.hexdigest(), self._size)

    def _hand_over(self) -> None:
        self._wait()
        self._pending = self._executor.submit(self._pass, memoryview(self._batch)[: self._filled])
        self._batch, self._spare, self._filled = self._spare, self._batch, 0

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _pass(self, data: memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._size += len(data)


def write_and_hash(file: Writable, spec: Spec, buffers: Iterable[Any]) -> Digest:
    """Like `write_tensors`; returns the sha256 and size of the written bytes."""
    with _Hashing(file) as hashing:
        write_tensors(hashing, spec, buffers)
        return hashing.close()


def write_tensors(file: Writable, spec: Spec, buffers: Iterable[Any]) -> None:
    """Write a safetensors file as a stream.

    Args:
        file: an object with `write(bytes-like)`.
        spec: the tensors to write.
        buffers: the tensors' bytes, in `file_order(spec)`, in any number of bytes-like pieces.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name in file_order(spec):
        end = offset + spec[name].num_bytes
        header[name] = {"dtype": spec[name].dtype, "shape": list(spec[name].shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    size = 0
    for buffer in chain((len(head).to_bytes(8, "little"), head), buffers):
        view = memoryview(buffer).cast("B")
        file.write(view)
        size += len(view)
    assert size == 8 + len(head) + offset, "the buffers do not add up to the spec"
