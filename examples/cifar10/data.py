"""CIFAR-10 from torchvision, or generated images for machines without the data or torchvision."""

from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset, TensorDataset


def load_cifar10(root: str, *, download: bool) -> tuple[Dataset, Dataset]:
    """Training and test set of CIFAR-10. Before sites share it, download it once with `python
    client.py --download`.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.transforms import Compose, Normalize, ToTensor

    transform = Compose([ToTensor(), Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
    folder = Path(root).expanduser()
    return (
        CIFAR10(folder, train=True, download=download, transform=transform),
        CIFAR10(folder, train=False, download=download, transform=transform),
    )


def make_synthetic(num_train: int = 2000, num_test: int = 500) -> tuple[Dataset, Dataset]:
    """Ten classes, each a fixed random picture plus noise: easy to learn, and the same at every
    site.
    """
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(10, 3, 32, 32, generator=generator)

    def make(count: int) -> TensorDataset:
        labels = torch.arange(count) % 10
        return TensorDataset(pictures[labels] + 2 * torch.randn(count, 3, 32, 32, generator=generator), labels)

    return make(num_train), make(num_test)


def part_of(dataset: Dataset, site: int, num_sites: int) -> Subset:
    """Every num_sites-th example, starting at the site's number."""
    return Subset(dataset, range(site, len(dataset), num_sites))
