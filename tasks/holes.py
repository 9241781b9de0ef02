"""Intended infinities of a model, such as the -inf of an attention mask: its *holes*.

An update may hold them, unchanged, where the global model does. The next global model keeps them to
the bit, and no mean, norm or difference includes them. A site that sends a finite value instead
fills the hole, as an observer that starts at infinity does. That value counts in the norm of its
update, because it moves the mean if all sites fill the hole. Only a tensor that has holes in the
initial model can have any later, so `job.json` names those. Jobs of earlier versions name none, so
their updates must be finite everywhere.
"""

from typing import TYPE_CHECKING

from fedpool.arrays import torch_block
from fedpool.tensors import Tensors, block_ranges

if TYPE_CHECKING:
    import torch


def holes(value: "torch.Tensor") -> "torch.Tensor | None":
    """Where a block of floating point numbers isn't finite, as booleans; None if nowhere."""
    where = ~value.isfinite()
    return where if bool(where.any()) else None


def unchanged(update: "torch.Tensor", at: "torch.Tensor", *, is_difference: bool) -> "torch.Tensor":
    """The holes of a block that an update leaves unchanged: with infinity, or any difference."""
    return at if is_difference else at & ~update.isfinite()


def keeps_holes(update: Tensors, base: Tensors, name: str, block_elements: int, *, is_difference: bool) -> bool:
    """Whether a tensor is finite except in the global model's holes, and unchanged there.

    In a difference, an unchanged hole is NaN, because infinity minus infinity is NaN.
    """
    for _, start, stop in block_ranges(name, update.spec[name].num_elements, block_elements):
        value, before = _block(update, name, start, stop), _block(base, name, start, stop)
        if (where := holes(value)) is None:
            continue
        same = value.isnan() & ~before.isfinite() if is_difference else value.double() == before.double()
        if not bool(same[where].all()):
            return False
    return True


def _block(reader: Tensors, name: str, start: int, stop: int) -> "torch.Tensor":
    return torch_block(reader.read_block(name, start, stop), reader.spec[name].dtype)
