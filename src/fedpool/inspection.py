"""Inspection of the values of tensors, for the gate, in the same pass that hashes them."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from fedpool.arrays import torch_block
from fedpool.checked import BlockTags, take_tags
from fedpool.tensor_stream import Writable, write_and_hash
from fedpool.tensors import ITEM_SIZES, BlockBytes, Digest, TensorReader, Tensors, block_ranges, blocks_of, file_order


@dataclass(frozen=True, slots=True)
class Inspection:
    """The results of one pass over a file of tensors."""

    digest: Digest
    not_finite: Mapping[str, str]
    """name -> place of its first NaN or infinity, for tensors that contain any, in file order."""
    extremes: Mapping[str, tuple[float, float]]
    """name -> lowest and highest finite value, for non-boolean tensors that have one."""
    tags: BlockTags
    """Of the file's blocks: the file could be replaced later."""


def inspect_tensors(reader: TensorReader, block_elements: int) -> Inspection:
    """Hash every byte and inspect every value of a file of tensors, in one pass."""
    seen = _Seen()
    digest, tags = take_tags(reader, block_elements, seen.look)
    return Inspection(digest, seen.not_finite, seen.extremes, tags)


def inspect_values(tensors: Tensors, block_elements: int) -> tuple[dict[str, str], dict[str, tuple[float, float]]]:
    """Inspect every value; returns `not_finite` and `extremes` of an `Inspection`."""
    seen = _Seen()
    for name, start, stop in blocks_of(tensors.spec, block_elements):
        seen.look(name, tensors.spec[name].dtype, start, tensors.read_block(name, start, stop))
    return seen.not_finite, seen.extremes


def write_and_inspect(file: Writable, tensors: Tensors, block_elements: int) -> Inspection:
    """Write tensors to a file and inspect them like `inspect_tensors`, in one pass."""
    seen, spec = _Seen(), tensors.spec
    tags = BlockTags(spec, block_elements)

    def blocks() -> Iterator[BlockBytes]:
        for name in file_order(spec):
            for _, start, stop in block_ranges(name, spec[name].num_elements, block_elements):
                data = tensors.read_block(name, start, stop)
                seen.look(name, spec[name].dtype, start, data)
                tags.take(name, start, data)
                yield data

    return Inspection(write_and_hash(file, spec, blocks()), seen.not_finite, seen.extremes, tags)


class _Seen:
    """The results so far; see `Inspection`."""

    def __init__(self) -> None:
        self.not_finite: dict[str, str] = {}
        self.extremes: dict[str, tuple[float, float]] = {}

    def look(self, name: str, code: str, start: int, data: BlockBytes) -> None:
        """Inspect a block of a tensor."""
        if code == "BOOL":
            return
        low, high = _extremes(data, code)
        if "F" in code and not (math.isfinite(low) and math.isfinite(high)):
            stop = start + len(data) // ITEM_SIZES[code]
            where = f"{name} holds NaN or infinity, first among its elements {start} to {stop - 1}"
            self.not_finite.setdefault(name, where)
            if (finite := _finite_extremes(data, code)) is None:
                return
            low, high = finite
        before = self.extremes.get(name, (low, high))
        self.extremes[name] = min(low, before[0]), max(high, before[1])


def not_finite_names(tensors: Tensors, block_elements: int, among: Collection[str] | None = None) -> list[str]:
    """Names of the tensors that contain NaN or infinity, sorted.

    Args:
        among: the tensors to read; None: all.
    """
    found: set[str] = set()
    for name, start, stop in blocks_of(tensors.spec, block_elements):
        if tensors.spec[name].kind == "float" and name not in found and (among is None or name in among):
            low, high = _extremes(tensors.read_block(name, start, stop), tensors.spec[name].dtype)
            if not (math.isfinite(low) and math.isfinite(high)):
                found.add(name)
    return sorted(found)


def _extremes(data: BlockBytes, code: str) -> tuple[float, float]:
    """Lowest and highest value of a block of numbers; both are NaN if the block contains one."""
    if "F" in code:
        low, high = torch_block(data, code).aminmax()
        return low.item(), high.item()
    import numpy as np  # torch can't do this for all of its unsigned integers

    integers = np.frombuffer(data, f"{code[0].lower()}{ITEM_SIZES[code]}")
    return int(integers.min()), int(integers.max())


def _finite_extremes(data: BlockBytes, code: str) -> tuple[float, float] | None:
    """Lowest and highest finite value of a floating point block; None if there is none."""
    value = torch_block(data, code)
    finite = value[value.isfinite()]
    if not finite.numel():
        return None
    low, high = finite.aminmax()
    return low.item(), high.item()
