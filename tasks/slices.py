"""The slices of a block that a strategy gets, read on access.

So a mean holds the block of one site at a time.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch

from fedpool.arrays import torch_block
from fedpool.errors import IntegrityError, ModelChanged
from fedpool.tasks.blocks import Block, widen
from fedpool.tasks.gate import Accepted
from fedpool.tasks.holes import unchanged
from fedpool.tasks.moved import moved
from fedpool.tasks.slots import read_wide
from fedpool.tasks.weighing import UpdateChanged
from fedpool.tensors import Tensors, beside


class _LazySlice(Mapping[str, torch.Tensor]):
    """A slice of one block that is read on access."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def __iter__(self) -> Iterator[str]:
        return iter((self._block.name,))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: str) -> torch.Tensor:
        if key != self._block.name:
            raise KeyError(key)
        return self._read()

    @abstractmethod
    def _read(self) -> torch.Tensor: ...


class GlobalSlice(_LazySlice):
    """The global model's part of a block."""

    def _read(self) -> torch.Tensor:
        return self._block.wide


class BesideSlice(_LazySlice):
    """Tensors that go with a block: in the strategy's slots, or in the update of a site."""

    def __init__(self, block: Block, tensors: Tensors, group: str, update: Accepted | None = None) -> None:
        super().__init__(block)
        self._tensors = tensors
        self._group = group
        self._update = update

    def _read(self) -> torch.Tensor:
        block = self._block
        try:
            return read_wide(self._tensors, beside(self._group, block.name), block.start, block.stop)
        except ModelChanged:
            raise
        except (IntegrityError, FileNotFoundError) as error:
            if self._update is None:
                raise
            raise UpdateChanged(self._update, str(error)) from error


class UpdateSlice(_LazySlice):
    """One update's part of a block."""

    def __init__(self, block: Block, update: Accepted) -> None:
        super().__init__(block)
        self._update = update
        # Only floating point numbers are scaled down.
        self._scale = update.scale if block.spec.kind == "float" else 1.0

    def unchanged(self, at: torch.Tensor) -> torch.Tensor:
        """The holes of the block that the update leaves unchanged, as booleans.

        Args:
            at: the block's holes, as booleans.
        """
        return unchanged(self._value(), at, is_difference=self._update.manifest.params_type == "DIFF")

    def _read(self) -> torch.Tensor:
        read = self._read_values()
        at = self._block.holes
        return read if at is None else read.masked_fill(self.unchanged(at), 0.0)

    def _value(self) -> torch.Tensor:
        """The block as the site sent it."""
        block, tensors = self._block, self._update.tensors
        assert tensors is not None
        try:
            data = tensors.read_block(block.name, block.start, block.stop)
        except ModelChanged:  # a filter compares with it
            raise
        except (IntegrityError, FileNotFoundError) as error:
            raise UpdateChanged(self._update, str(error)) from error
        return torch_block(data, tensors.spec[block.name].dtype)

    def _read_values(self) -> torch.Tensor:
        block, value = self._block, self._value()
        if (origin := self._update.origin) is not None:
            is_difference = self._update.manifest.params_type == "DIFF"
            return moved(block, value, origin.base, is_difference=is_difference, scale=self._scale)
        # Booleans have no difference: a DIFF holds the site's own value.
        if self._update.manifest.params_type == "DIFF" and value.dtype is not torch.bool:
            return value.to(torch.float64) * self._scale + block.wide
        full = widen(value, block.origin)
        return full if self._scale == 1.0 else block.wide + (full - block.wide) * self._scale
