"""The "large" workload: 300 MB of float32 weights and no data, so its cost is that of moving a
model.

Every site adds 1 to every weight, so after r rounds the average is r everywhere. A wrong sum shows.
"""

import torch
from torch import nn

NUM_TENSORS = 10
TENSOR_SIZE = 7_500_000


class Weights(nn.Module):
    """Ten tensors of 7.5 million zeros. Takes no arguments, because NVFlare rebuilds the model
    from its class path.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.zeros(TENSOR_SIZE) for _ in range(NUM_TENSORS))


def build_model() -> nn.Module:
    """The initial model."""
    return Weights()


@torch.no_grad()
def train(model: nn.Module, *, site: int, num_sites: int, round_number: int) -> int:
    """Add 1 to every weight, in place. Returns the number of steps, 1 at every site."""
    for tensor in model.parameters():
        tensor.add_(1)
    return 1


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """The last weight of the last tensor: the number of rounds behind this model."""
    return float(list(model.parameters())[-1][-1])
