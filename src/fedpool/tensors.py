"""The safetensors format, written as a stream and read in blocks; no framework, no whole model in memory.

The safetensors library (used where a script loads a whole model) writes a file only from a complete dict and reads only
whole tensors from a local path. The coordinator aggregates block by block from any store, so this module holds the
format itself: 8 bytes of header length (little endian), a JSON header, the tensors' bytes
(https://huggingface.co/docs/safetensors). Same tensors, same bytes: names are ordered by (item size descending, name),
which also aligns every tensor.

Legend: a *spec* maps names to `TensorSpec`; a *block* is a run of consecutive elements of one tensor, flattened in C order.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, Self

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
    """Name of the tensor that lies beside a parameter, in a group: a control variate, a server's momentum."""
    return f"{group}{_SEPARATOR}{name}"


def is_beside(name: str) -> bool:
    """Whether a tensor lies beside a parameter."""
    return _SEPARATOR in name


def split_beside(name: str) -> tuple[str, str]:
    """(group, parameter) of a tensor that lies beside a parameter."""
    group, _, parameter = name.partition(_SEPARATOR)
    return group, parameter


class Writable(Protocol):
    """The one method of a file that a stream of tensors needs."""

    def write(self, data: Any, /) -> Any:
        """Append bytes."""
        ...


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
        """`float`, `int` or `bool`: what a dtype may be swapped for without changing what the value means."""
        return "float" if "F" in self.dtype else "bool" if self.dtype == "BOOL" else "int"

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


_STATISTICS = ("running_mean", "running_var")


def is_trained(name: str, spec: TensorSpec) -> bool:
    """Whether gradients move a parameter: not integers and booleans, and not the running statistics of torch's normalisations.

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


_BATCH_BYTES = 4 << 20


class _Hashing:
    """A file that hashes what passes through it, batch by batch on a thread of its own while the caller computes the next."""

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
    """`write_tensors`, with sha256 and size of what was written."""
    with _Hashing(file) as hashing:
        write_tensors(hashing, spec, buffers)
        return hashing.close()


def write_tensors(file: Writable, spec: Spec, buffers: Iterable[Any]) -> None:
    """Write a safetensors file as a stream.

    Args:
        file: anything with `write(bytes-like)`.
        spec: what is written.
        buffers: the tensors' bytes, in `file_order(spec)`, in as many bytes-like pieces as the caller likes.
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


class TensorReader:
    """Random access to the tensors of a safetensors file, block by block, through a function that reads byte ranges.

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
        # Tensors that overlap or leave holes would let a file hold bytes that no check ever looks at.
        position = 0
        for start, end in sorted(spans):
            if start != position:
                raise self._bad(f"its tensors overlap or leave a hole at byte {position}")
            position = end
        if 8 + length + position != total:
            raise self._bad(f"it has {total} bytes where its header describes {8 + length + position}")

    def _bad(self, why: str) -> IntegrityError:
        return IntegrityError(f"{self.where} is not a sound safetensors file: {why}")

    def blocks(self, num_elements: int) -> Iterator[tuple[str, int, int]]:
        """(name, start, stop) of every block, at most `num_elements` each, in the order of the file: after `head`, all of it."""
        for name in sorted(self.spec, key=lambda name: self._offsets[name]):
            yield from block_ranges(name, self.spec[name].num_elements, num_elements)

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
        """The same file, every block of which must be the one that was seen before; see `Inspection.blocks`."""
        other = copy(self)
        other._blocks = blocks
        return other


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one pass over a file of tensors has seen."""

    digest: Digest
    not_finite: Mapping[str, str]
    """name -> where its first NaN or infinity is, of the tensors that hold any, in the order of the file."""
    extremes: Mapping[str, tuple[float, float]]
    """name -> lowest and highest finite value, of the tensors that are not boolean and have one."""
    blocks: Mapping[tuple[str, int, int], bytes] | None = None
    """(name, start, stop) -> sha256 of that block, where somebody else could swap the file after this."""
