"""Infinities that a model holds by design, such as the -inf of an attention mask: its *holes*.

An update may hold them where the global model does, unchanged, and the next global model keeps them
to the bit; they are part of no mean, norm or difference. A site that sends a finite value in their
place fills the hole, as an observer that begins at infinity does; that value counts in the norm of
its update, because it moves the mean if all sites fill the hole. Only a tensor that has holes in
the initial model can have any later, so `job.json` names those; a job of an earlier version names
none, and its updates must be finite everywhere.
"""

from typing import TYPE_CHECKING

from fedpool.arrays import torch_block
from fedpool.tensors import Tensors, block_ranges

if TYPE_CHECKING:
    import torch


def holes(value: "torch.Tensor") -> "torch.Tensor | None":
    """Where a block of floating point numbers is not finite, as booleans; None when it is
    everywhere.
    """
    where = ~value.isfinite()
    return where if bool(where.any()) else None


def unchanged(update: "torch.Tensor", at: "torch.Tensor", *, is_difference: bool) -> "torch.Tensor":
    """Which of the holes of a block an update leaves as they are: it holds infinity there, or
    any difference to it.
    """
    return at if is_difference else at & ~update.isfinite()


def keeps_holes(update: Tensors, base: Tensors, name: str, block_elements: int, *, is_difference: bool) -> bool:
    """Whether a tensor of an update is finite except in the holes of the global model, and the same
    there.

    The difference of two infinities is NaN: as a difference that is what no change looks like.
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
