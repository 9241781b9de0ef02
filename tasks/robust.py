"""Strategies that a few wrong updates cannot pull far: the coordinate-wise median.

Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", algorithm 1, option I
(https://arxiv.org/abs/1803.01498).
"""

from collections.abc import Sequence

import torch

from fedpool.tasks.strategy import Slice, State, Update


class Median:
    """Each element is the median of the sites' elements, whatever their weights; of an even number, the mean of the middle two.

    Holds a block of every site at a time.
    """

    def init(self, params: Slice) -> State:
        """See `Strategy.init`."""
        return State(params)

    def apply(self, state: State, updates: Sequence[Update]) -> tuple[Slice, State]:
        """See `Strategy.apply`."""
        params = {name: _median(torch.stack([update.params[name] for update in updates])) for name in state.params}
        return params, State(params)


def _median(values: torch.Tensor) -> torch.Tensor:
    ordered = values.sort(dim=0).values
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low + (high - low) / 2  # their sum could overflow
