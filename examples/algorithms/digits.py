"""The clients' shared code: a small model with batch normalisation, and each site's part of
scikit-learn's digits.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

NUM_SITES = 3


class Network(nn.Module):
    """One hidden layer with batch normalisation; input (batch, 64), output (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores of a batch of images."""
        return self.head(torch.relu(self.norm(self.hidden(images))))


class Digits:
    """The rows of one site, and the test rows that all sites share."""

    def __init__(self, site_name: str) -> None:
        site = int(site_name.split("-")[1]) - 1
        digits = load_digits()
        images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
        self.images, self.labels = images[:1437][site::NUM_SITES], labels[:1437][site::NUM_SITES]
        self.test_images, self.test_labels = images[1437:], labels[1437:]

    def batches(self, size: int = 32):
        """Yield the images and labels of each batch of an epoch, in random order."""
        for index in torch.randperm(len(self.labels)).split(size):
            yield self.images[index], self.labels[index]

    def accuracy(self, model: nn.Module) -> float:
        """Share of the test images that the model gets right."""
        model.eval()
        with torch.no_grad():
            return (model(self.test_images).argmax(1) == self.test_labels).float().mean().item()
