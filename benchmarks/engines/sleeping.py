"""The "sleep" workload: training takes 3 s and no processor. The rest of a round's time is the
framework's.

Every site adds 1 to every weight, so after r rounds the average is r everywhere. A wrong sum shows.
"""

import time

import torch
from torch import nn

TRAINING_S = 3.0


class Network(nn.Sequential):
    """An MLP of 64-32-10, all zeros. Takes no arguments, because NVFlare rebuilds the model from
    its class path.
    """

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.zero_()


def build_model() -> nn.Module:
    """The initial model."""
    return Network()


@torch.no_grad()
def train(model: nn.Module, *, site: int, num_sites: int, round_number: int) -> int:
    """Sleep, and add 1 to every weight, in place. Returns the number of steps, 1 at every site."""
    time.sleep(TRAINING_S)
    for tensor in model.parameters():
        tensor.add_(1)
    return 1


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """The last weight of the last tensor: the number of rounds behind this model."""
    return float(list(model.parameters())[-1][-1])
