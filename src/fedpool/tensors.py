"""Reading the safetensors format in blocks, without a framework or a whole model in memory.

`fedpool.tensor_stream` writes it. The safetensors library, which scripts use to load whole models,
can write a file only from a complete dict, and read only whole tensors from a local path. The
coordinator aggregates block by block from any store, so this module implements the format: 8 bytes
of header length (little endian), a JSON header, the tensors' bytes
(https://huggingface.co/docs/safetensors). The same tensors give the same bytes: names are ordered
by (item size descending, name), which also aligns every tensor.

Terms: a *spec* maps names to `TensorSpec`; a *block* is a run of consecutive elements of one
tensor, flattened in C order.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedpool.errors import IntegrityError

ITEM_SIZES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element, for every dtype that can be exchanged."""

MAX_HEADER_BYTES = 64 << 20
METADATA = "__metadata__"
"""A key of the header that isn't a tensor's name."""

_SEPARATOR = "::"


def beside(group: str, name: str) -> str:
    """Name of a group's tensor beside a parameter: a control variate, a server's momentum."""
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
    """dtype (safetensors name) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Product of the shape; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.num_elements * ITEM_SIZES[self.dtype]

    @property
    def kind(self) -> str:
        """`float`, `int` or `bool`. Dtypes of one kind can replace each other."""
        return "float" if "F" in self.dtype else "bool" if self.dtype == "BOOL" else "int"

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


_STATISTICS = ("running_mean", "running_var")


def is_trained(name: str, spec: TensorSpec) -> bool:
    """Whether gradients change a parameter: not integers, booleans or torch's running statistics.

    For those a step beyond the mean, like momentum's, could make a variance negative.
    """
    return spec.kind == "float" and name.rpartition(".")[2] not in _STATISTICS


Spec = Mapping[str, TensorSpec]
BlockBytes = bytearray | memoryview
"""The bytes of a block. They are writable, so an array can use them as its memory."""
ReadRange = Callable[[int, int], BlockBytes]


@dataclass(frozen=True, slots=True)
class Digest:
    """An object's bytes according to a manifest: sha256 in hex, size in bytes."""

    sha256: str
    size: int


def file_order(spec: Spec) -> list[str]:
    """The names in the order of their bytes in the file."""
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
    """Named tensors that are read block by block, from a file or computed by a filter."""

    @property
    def spec(self) -> Spec:
        """dtype and shape of each."""
        ...

    def read_block(self, name: str, start: int, stop: int) -> BlockBytes:
        """Bytes of elements `start` to `stop` of the flattened tensor, little endian, writable."""
        ...


class TensorReader:
    """Block-wise access to the tensors in a safetensors file, by a function that reads byte ranges.

    Doesn't check the file's hash: the gate, the store and `fedpool.checked` do.

    Args:
        read_range: (start, stop) -> the bytes in between.
        size: size of the file in bytes.
        where: name of the file, for error messages.
        max_header: length of the longest header to read.

    Raises:
        IntegrityError: the file has no valid safetensors header for its size.
    """

    def __init__(self, read_range: ReadRange, size: int, *, where: str, max_header: int = MAX_HEADER_BYTES) -> None:
        self._read_range = read_range
        self._max_header = max_header
        self._size = size
        self.where = where
        self.head = b""
        """Header length and header: the bytes before the tensors."""
        self._offsets: dict[str, int] = {}
        self.spec: dict[str, TensorSpec] = {}
        """In file order: `head` and these tensors' blocks are the whole file."""
        self._parse()

    def _parse(self) -> None:
        total = self._size
        length = int.from_bytes(self._read_range(0, 8), "little") if total >= 8 else 0
        if total < 8 or length > min(total - 8, self._max_header):
            raise self._bad(f"its header claims {length} bytes, but the file has {total}")
        self.head = bytes(self._read_range(0, 8 + length))
        try:
            header = json.loads(self.head[8:])
        except (ValueError, RecursionError) as error:
            raise self._bad(f"its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._bad("its header is not a JSON object")
        header.pop(METADATA, None)
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
        # Tensors that overlap or leave gaps could hide bytes that no check looks at.
        position = 0
        for start, end in sorted(spans):
            if start != position:
                raise self._bad(f"its tensors overlap or leave a gap at byte {position}")
            position = end
        if 8 + length + position != total:
            raise self._bad(f"it has {total} bytes, but its header describes {8 + length + position}")

    def _bad(self, why: str) -> IntegrityError:
        return IntegrityError(f"{self.where} is not a valid safetensors file: {why}")

    def read_block(self, name: str, start: int, stop: int) -> BlockBytes:
        """The bytes of elements `start` to `stop` of the flattened tensor `name`."""
        item = ITEM_SIZES[self.spec[name].dtype]
        offset = self._offsets[name]
        block = self._read_range(offset + start * item, offset + stop * item)
        if len(block) != (stop - start) * item:
            raise self._bad(f"it ended inside {name!r}")
        return block
