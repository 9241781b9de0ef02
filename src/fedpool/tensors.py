"""The safetensors format, read in blocks; `fedpool.tensor_stream` writes it. No framework, no whole
model in memory.

The safetensors library (used where a script loads a whole model) writes a file only from a complete
dict and reads only whole tensors from a local path. The coordinator aggregates block by block from
any store, so this module holds the format itself: 8 bytes of header length (little endian), a JSON
header, the tensors' bytes (https://huggingface.co/docs/safetensors). Same tensors, same bytes:
names are ordered by (item size descending, name), which also aligns every tensor.

Legend: a *spec* maps names to `TensorSpec`; a *block* is a run of consecutive elements of one
tensor, flattened in C order.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Protocol, Self

from fedpool.errors import IntegrityError

ITEM_SIZES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of every dtype that may travel."""

MAX_HEADER_BYTES = 64 << 20

_SEPARATOR = "::"


def beside(group: str, name: str) -> str:
    """Name of the tensor that lies beside a parameter, in a group: a control variate, a server's
    momentum.
    """
    return f"{group}{_SEPARATOR}{name}"


def is_beside(name: str) -> bool:
    """Whether a tensor lies beside a parameter."""
    return _SEPARATOR in name


def split_beside(name: str) -> tuple[str, str]:
    """(group, parameter) of a tensor that lies beside a parameter."""
    group, _, parameter = name.partition(_SEPARATOR)
    return group, parameter


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """dtype (safetensors name) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Product of the shape; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's bytes."""
        return self.num_elements * ITEM_SIZES[self.dtype]

    @property
    def kind(self) -> str:
        """`float`, `int` or `bool`: what a dtype may be swapped for without changing what the
        value means.
        """
        return "float" if "F" in self.dtype else "bool" if self.dtype == "BOOL" else "int"

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


_STATISTICS = ("running_mean", "running_var")


def is_trained(name: str, spec: TensorSpec) -> bool:
    """Whether gradients move a parameter: not integers and booleans, and not the running statistics
    of torch's normalisations.

    A step beyond the mean, as momentum takes it, would make a variance negative.
    """
    return spec.kind == "float" and name.rpartition(".")[2] not in _STATISTICS


Spec = Mapping[str, TensorSpec]
BlockBytes = bytearray | memoryview
"""The bytes of a block, which may be written to: an array can stand on them."""
ReadRange = Callable[[int, int], BlockBytes]


@dataclass(frozen=True, slots=True)
class Digest:
    """What a manifest says of an object's bytes: sha256 in hex, size in bytes."""

    sha256: str
    size: int


def file_order(spec: Spec) -> list[str]:
    """The names in the order in which their bytes lie in the file."""
    return sorted(spec, key=lambda name: (-ITEM_SIZES[spec[name].dtype], name))


def block_ranges(name: str, size: int, num_elements: int) -> Iterator[tuple[str, int, int]]:
    """(name, start, stop) of the blocks of a tensor of `size` elements."""
    for start in range(0, size, num_elements):
        yield name, start, min(start + num_elements, size)


def blocks_of(spec: Spec, num_elements: int) -> Iterator[tuple[str, int, int]]:
    """(name, start, stop) of every block, at most `num_elements` each, in the order of the spec."""
    for name, entry in spec.items():
        yield from block_ranges(name, entry.num_elements, num_elements)


class Tensors(Protocol):
    """Named tensors that are read block by block: a file's, or what a filter makes of others."""

    @property
    def spec(self) -> Spec:
        """dtype and shape of each."""
        ...

    def read_block(self, name: str, start: int, stop: int) -> BlockBytes:
        """The bytes of elements `start` to `stop` of the flattened tensor `name`, little endian;
        they may be written to.
        """
        ...


class TensorReader:
    """Random access to the tensors of a safetensors file, block by block, through a function that
    reads byte ranges.

    Does not check the file's hash: that is the gate's duty, and the store's.

    Args:
        read_range: (start, stop) -> the bytes in between.
        size: of the file in bytes.
        where: what to call the file in errors.
        max_header: length of the longest header that is read.

    Raises:
        IntegrityError: the header is not that of a safetensors file of that size.
    """

    def __init__(self, read_range: ReadRange, size: int, *, where: str, max_header: int = MAX_HEADER_BYTES) -> None:
        self._read_range = read_range
        self._max_header = max_header
        self._blocks: Mapping[tuple[str, int, int], bytes] | None = None
        self._size = size
        self.where = where
        self.head = b""
        """Header length and header: what comes before the tensors' bytes."""
        self._offsets: dict[str, int] = {}
        self.spec: dict[str, TensorSpec] = {}
        """In the order of the file: after `head`, its blocks are all of it."""
        self._parse()

    def _parse(self) -> None:
        total = self._size
        length = int.from_bytes(self._read_range(0, 8), "little") if total >= 8 else 0
        if total < 8 or length > min(total - 8, self._max_header):
            raise self._bad(f"its header claims {length} bytes of a file of {total}")
        self.head = bytes(self._read_range(0, 8 + length))
        try:
            header = json.loads(self.head[8:])
        except (ValueError, RecursionError) as error:
            raise self._bad(f"its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._bad("its header is not a JSON object")
        header.pop("__metadata__", None)
        spans: list[tuple[int, int]] = []
        for name, entry in header.items():
            try:
                dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
                whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
                known = dtype in ITEM_SIZES
            except (TypeError, KeyError, ValueError):
                raise self._bad(f"the entry of {name!r} is malformed") from None
            if not whole or not known:
                raise self._bad(f"the entry of {name!r} has an unknown dtype or a bad shape: {dtype!r} {shape!r}")
            spec = TensorSpec(dtype, tuple(shape))
            if end - start != spec.num_bytes:
                raise self._bad(f"{name!r} is {spec} but has {end - start} bytes")
            self.spec[name] = spec
            self._offsets[name] = 8 + length + start
            spans.append((start, end))
        self.spec = {name: self.spec[name] for name in sorted(self.spec, key=lambda name: self._offsets[name])}
        # Tensors that overlap or leave holes would let a file hold bytes that no check ever looks
        # at.
        position = 0
        for start, end in sorted(spans):
            if start != position:
                raise self._bad(f"its tensors overlap or leave a hole at byte {position}")
            position = end
        if 8 + length + position != total:
            raise self._bad(f"it has {total} bytes where its header describes {8 + length + position}")

    def _bad(self, why: str) -> IntegrityError:
        return IntegrityError(f"{self.where} is not a sound safetensors file: {why}")

    def read_block(self, name: str, start: int, stop: int) -> BlockBytes:
        """The bytes of elements `start` to `stop` of the flattened tensor `name`."""
        item = ITEM_SIZES[self.spec[name].dtype]
        offset = self._offsets[name]
        block = self._read_range(offset + start * item, offset + stop * item)
        if len(block) != (stop - start) * item:
            raise self._bad(f"it ended inside {name!r}")
        if self._blocks is not None and hashlib.sha256(block).digest() != self._blocks.get((name, start, stop)):
            raise IntegrityError(f"{self.where} was changed after it had been checked: {name!r} differs")
        return block

    def checked(self, blocks: Mapping[tuple[str, int, int], bytes]) -> Self:
        """The same file, every block of which must be the one that was seen before; see
        `Inspection.blocks`.
        """
        other = copy(self)
        other._blocks = blocks
        return other
