"""A block of the global model: from its bytes to the float64 that a strategy sees, and back."""

import math
from collections.abc import Collection
from functools import cached_property

import torch

from fedpool.arrays import torch_block, torch_dtype
from fedpool.errors import RoundError
from fedpool.tasks.holes import holes
from fedpool.tensors import BlockBytes, TensorReader


class Block:
    """A block of the global model, read when it is first asked for: a plain mean never asks."""

    def __init__(self, base: TensorReader, may_have_holes: Collection[str], name: str, start: int, stop: int) -> None:
        self._base = base
        self._may_have_holes = name in may_have_holes
        self.name = name
        self.start = start
        self.stop = stop
        self.spec = base.spec[name]

    @cached_property
    def data(self) -> BlockBytes:
        """Its bytes."""
        return self._base.read_block(self.name, self.start, self.stop)

    @cached_property
    def value(self) -> torch.Tensor:
        """The block in its own dtype."""
        return torch_block(self.data, self.spec.dtype)

    @cached_property
    def origin(self) -> torch.Tensor | None:
        """What integers are differences to: the block made even, so that halves are rounded to
        the same side as without.
        """
        return self.value.to(torch.int64) & ~1 if self.spec.kind == "int" else None

    @cached_property
    def holes(self) -> torch.Tensor | None:
        """Where it is not finite, if anywhere."""
        return holes(self.value) if self._may_have_holes else None

    @cached_property
    def wide(self) -> torch.Tensor:
        """The block as a strategy sees it: finite."""
        wide = widen(self.value, self.origin)
        return wide if self.holes is None else wide.masked_fill(self.holes, 0.0)


def widen(value: torch.Tensor, origin: torch.Tensor | None) -> torch.Tensor:
    """float64 of a block; integers as differences to `origin`, because float64 holds no integer
    above 2**53 for sure.
    """
    return (value if origin is None else value.to(torch.int64) - origin).to(torch.float64)


def narrow(value: torch.Tensor, block: Block) -> torch.Tensor:
    """Back from float64: integers are rounded, a boolean is the majority's (a tie leaves it as
    it was).
    """
    dtype = torch_dtype(block.spec.dtype)
    if block.spec.kind == "bool":
        return torch.where(value == 0.5, block.value, value > 0.5)
    if block.origin is not None:
        whole = block.origin + value.round().to(torch.int64)
        limits = torch.iinfo(dtype)
        if not (limits.min <= whole.min().item() and whole.max().item() <= limits.max):
            raise RoundError(
                f"the aggregate of {block.name} does not fit its dtype {block.spec.dtype}: its values are too large"
            )
        return whole.to(dtype)
    result = value.to(dtype)
    low, high = result.aminmax()
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise RoundError(
            f"the aggregate of {block.name} is not finite, though every update was: their values are too large"
        )
    return result
