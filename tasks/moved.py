"""What a late update comes to in the round that it counts in: the global model, moved as its
site has moved its own base.
"""

import torch

from fedpool.arrays import torch_block
from fedpool.tasks.blocks import Block, widen
from fedpool.tensors import Tensors, is_trained


def moved(block: Block, value: torch.Tensor, base: Tensors, *, is_difference: bool, scale: float) -> torch.Tensor:
    """The block of a late update as a strategy sees it, float64.

    Of a parameter that is trained, the round's global model plus the difference to the update's own
    base, times `scale`. What nobody trains is the site's own value: a sum of differences makes a
    variance negative, and a boolean has none. A hole (see `fedpool.tasks.holes`) that the site left
    as it was says nothing of what others have filled it with: there the difference is 0.

    Args:
        value: as the site sent it, (elements,).
        base: the global model of the update's own round.
        is_difference: whether it sent a difference to that.
    """
    own = widen(value, None if is_difference else block.origin)
    trained = is_trained(block.name, block.spec)
    if value.dtype is torch.bool or not (trained or is_difference or scale != 1.0):
        return own if block.spec.kind != "float" else torch.where(own.isfinite(), own, block.wide)
    before = torch_block(base.read_block(block.name, block.start, block.stop), base.spec[block.name].dtype)
    start = widen(before, block.origin)
    if block.spec.kind == "float":
        start = start.masked_fill(~start.isfinite(), 0.0)
    difference = own if is_difference else own - start
    if block.spec.kind == "float":
        difference = difference.masked_fill(~difference.isfinite(), 0.0) * scale
    return (block.wide if trained else start) + difference
