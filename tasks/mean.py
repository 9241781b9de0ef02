"""The weighted mean of tensors, one at a time.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
algorithm 1 (https://arxiv.org/abs/1602.05629): w <- sum_k (n_k / n) w_k.
"""

import math
from collections.abc import Iterable

import torch

_ROOM = 2.0**-64


def weighted_mean(values: Iterable[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """sum(weight * tensor) / sum(weight), in float64, read once and in order.

    A running mean (West 1979): m <- m + (x - m) * w / W. Unlike a sum that is divided at the end,
    it gives exactly the values of a lone site, or the value that all sites agree on, and it never
    exceeds theirs. Only the ratios of the weights matter: scaling all of them by a power of two
    changes no bit, and W may be larger than a double can hold.

    Args:
        values: (finite weight from 0, float64 tensor) pairs, all of one shape, at least one weight
            above 0.

    Raises:
        ValueError: no weight is above 0.
    """
    total, scale = 0.0, 1.0
    mean: torch.Tensor | None = None
    own = False  # the first value is the caller's: only what came of it may be written to
    for weight, value in values:
        if weight == 0:
            continue
        part = float(weight) * scale
        if math.isinf(total + part):
            total, scale, part = total * _ROOM, scale * _ROOM, part * _ROOM
        total += part
        if mean is None:
            mean = value
        else:
            mean = mean.lerp_(value, part / total) if own else mean.lerp(value, part / total)
            own = True
    if mean is None:
        raise ValueError("no value has a weight above 0")
    return mean
