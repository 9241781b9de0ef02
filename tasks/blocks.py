"""A block of the global model: converts its bytes to the float64 that a strategy sees, and back."""

import math
from collections.abc import Collection
from functools import cached_property

import torch

from fedpool.arrays import torch_block, torch_dtype
from fedpool.errors import RoundError
from fedpool.tasks.holes import holes
from fedpool.tensors import BlockBytes, Tensors


class Block:
    """A block of the global model. It is read on first use, because a plain mean never needs it."""

    def __init__(self, base: Tensors, may_have_holes: Collection[str], name: str, start: int, stop: int) -> None:
        self._base = base
        self._may_have_holes = name in may_have_holes
        self.name = name
        self.start = start
        self.stop = stop
        self.spec = base.spec[name]

    @cached_property
    def data(self) -> BlockBytes:
        """The block's bytes."""
        return self._base.read_block(self.name, self.start, self.stop)

    @cached_property
    def value(self) -> torch.Tensor:
        """The block in its own dtype."""
        return torch_block(self.data, self.spec.dtype)

    @cached_property
    def origin(self) -> torch.Tensor | None:
        """The base of integer differences: the block made even, so halves round the same way."""
        return self.value.to(torch.int64) & ~1 if self.spec.kind == "int" else None

    @cached_property
    def holes(self) -> torch.Tensor | None:
        """Where the block isn't finite; None if it is finite everywhere."""
        return holes(self.value) if self._may_have_holes else None

    @cached_property
    def wide(self) -> torch.Tensor:
        """The block as a strategy sees it: finite, in float64."""
        wide = widen(self.value, self.origin)
        return wide if self.holes is None else wide.masked_fill(self.holes, 0.0)


def widen(value: torch.Tensor, origin: torch.Tensor | None) -> torch.Tensor:
    """A block in float64, which is inexact above 2**53: integers become differences to `origin`."""
    return (value if origin is None else value.to(torch.int64) - origin).to(torch.float64)


def narrow(value: torch.Tensor, block: Block) -> torch.Tensor:
    """The inverse of `widen`: rounds integers; booleans go by majority (a tie changes nothing)."""
    dtype = torch_dtype(block.spec.dtype)
    if block.spec.kind == "bool":
        return torch.where(value == 0.5, block.value, value > 0.5)
    if block.origin is not None:
        whole = block.origin + value.round().to(torch.int64)
        limits = torch.iinfo(dtype)
        if not (limits.min <= whole.min().item() and whole.max().item() <= limits.max):
            raise RoundError(
                f"the aggregate of {block.name} does not fit its dtype {block.spec.dtype}, because the values are too large"
            )
        return whole.to(dtype)
    result = value.to(dtype)
    low, high = result.aminmax()
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise RoundError(
            f"the aggregate of {block.name} is not finite although every update was, because their values are too large"
        )
    return result
