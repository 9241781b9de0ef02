"""Applies a late update's difference to its own base to the global model of a later round."""

import torch

from fedpool.arrays import torch_block
from fedpool.tasks.blocks import Block, widen
from fedpool.tensors import Tensors, is_trained


def moved(block: Block, value: torch.Tensor, base: Tensors, *, is_difference: bool, scale: float) -> torch.Tensor:
    """The block of a late update as a strategy sees it, float64.

    For a trained parameter: the round's global model plus `scale` times the difference to the
    update's own base. Values that aren't trained are the site's own, because a sum of differences
    could make a variance negative, and booleans have no differences. If the site left a hole (see
    `fedpool.tasks.holes`) unchanged, the difference there is 0, whatever other sites filled it
    with.

    Args:
        value: as the site sent it, (elements,).
        base: the global model of the update's own round.
        is_difference: whether `value` is a difference to `base`.
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
