"""Stores a strategy's slots as an object in the store, `state.safetensors`.

Legend: slot `momentum` of parameter `fc.weight` is the tensor `momentum::fc.weight`, with the
parameter's shape, in float64 if the parameter is float64, else in float32.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from fedpool.arrays import as_bytes, torch_block, torch_dtype
from fedpool.checked import BlockTags
from fedpool.errors import RoundError
from fedpool.store import Store
from fedpool.tensor_stream import write_and_hash
from fedpool.tensors import ITEM_SIZES, Digest, Spec, Tensors, TensorSpec, beside, file_order, is_trained

_COPY_BYTES = 4 << 20


def beside_spec(groups: Iterable[str], spec: Spec) -> dict[str, TensorSpec]:
    """The spec of the tensors beside a model's trained parameters, for all groups."""
    return {
        beside(group, name): TensorSpec("F64" if entry.dtype == "F64" else "F32", entry.shape)
        for group in groups
        for name, entry in spec.items()
        if is_trained(name, entry)
    }


class SlotFile:
    """The slots of the next round while they are computed, in any order, on this machine's disk."""

    def __init__(self, spec: Spec, descriptor: int, block_elements: int) -> None:
        self.spec = spec
        self.tags = BlockTags(spec, block_elements)
        """Of the blocks that were put into it."""
        self._descriptor = descriptor
        self._offsets: dict[str, int] = {}
        self._size = 0
        for name in file_order(spec):
            self._offsets[name] = self._size
            self._size += spec[name].num_bytes

    def put(self, name: str, start: int, value: torch.Tensor) -> None:
        """Store one block of a slot, a flat float64 tensor.

        Raises:
            RoundError: it holds NaN, infinity, or a value outside float32's range.
        """
        code = self.spec[name].dtype
        narrow = value.to(torch_dtype(code))
        if not bool(narrow.isfinite().all()):
            raise RoundError(f"the server's {name} is not finite: use a smaller server learning rate")
        data = as_bytes(narrow)
        self.tags.take(name, start, data)
        os.pwrite(self._descriptor, data, self._offsets[name] + start * ITEM_SIZES[code])

    def save(self, store: Store, path: str) -> Digest:
        """Write the slots to the store."""
        with store.staged(path) as file:
            return write_and_hash(file, self.spec, self._read())

    def _read(self) -> Iterator[bytes]:
        for offset in range(0, self._size, _COPY_BYTES):
            yield os.pread(self._descriptor, min(_COPY_BYTES, self._size - offset), offset)


@contextmanager
def slot_file(spec: Spec, block_elements: int) -> Iterator[SlotFile]:
    """A file for slots that are being computed, in blocks; deleted afterwards."""
    with tempfile.TemporaryFile(prefix="fedpool-") as file:
        yield SlotFile(spec, file.fileno(), block_elements)


def read_wide(reader: Tensors, name: str, start: int, stop: int) -> torch.Tensor:
    """A block of a tensor beside a parameter, as a strategy sees it."""
    return torch_block(reader.read_block(name, start, stop), reader.spec[name].dtype).to(torch.float64)
