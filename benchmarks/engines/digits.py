"""The "digits" workload: a small classifier for the digits that scikit-learn contains, so nothing
is downloaded.

scikit-learn stores them as compressed text, and reading that would dominate a cold site's time. So
measure.py puts them next to the stamps as an array, for every engine alike.

Rows 0-1436 are for training and are dealt to the sites one by one (site i of n has i, i + n, ...);
rows 1437-1796 are for testing. The order of the batches depends only on the site and the round, so
every engine must reach the same accuracy.
"""

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_TRAIN = 1437
BATCH_SIZE = 32
LEARNING_RATE = 0.05


class Network(nn.Sequential):
    """An MLP of 64-32-10. Takes no arguments, because NVFlare rebuilds the model from its class
    path.
    """

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def build_model() -> nn.Module:
    """The initial model; the same in every process."""
    return Network()


def train(model: nn.Module, *, site: int, num_sites: int, round_number: int) -> int:
    """Train one epoch on the site's rows, in place. Sites and rounds count from 0. Returns the
    number of steps.
    """
    features, labels = _rows()
    features, labels = features[site:NUM_TRAIN:num_sites], labels[site:NUM_TRAIN:num_sites]
    generator = torch.Generator().manual_seed(1000 * round_number + site)
    batches = torch.randperm(len(labels), generator=generator).split(BATCH_SIZE)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(features[batch]), labels[batch]).backward()
        optimizer.step()
    return len(batches)


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """Accuracy on the test rows."""
    features, labels = _rows()
    return float((model(features[NUM_TRAIN:]).argmax(dim=1) == labels[NUM_TRAIN:]).float().mean())


@cache
def _rows() -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(np.load(Path(os.environ["BENCH_STAMPS"]).with_name("digits.npy")))  # from measure.py
    return (rows[:, :-1] / 16).to(torch.float32), rows[:, -1].to(torch.int64)
