"""Data sets of a few random images, with torchvision's constructors."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

NUM_TRAINED, NUM_SCORED = int(os.environ.get("SYNTHETIC_IMAGES", "64")), 32


class _Images(torch.utils.data.Dataset[tuple[Any, int]]):
    def __init__(self, size: int, shape: tuple[int, ...], seed: int, transform: Callable[[Any], Any] | None) -> None:
        generator = np.random.default_rng(seed)
        self.data = generator.integers(0, 256, (size, *shape), dtype=np.uint8)
        self.targets = [int(target) for target in generator.integers(0, 10, size)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.data[index]
        return (self.transform(image) if self.transform else image), self.targets[index]


class CIFAR10(_Images):
    """Colour images of 32 by 32 pixels."""

    classes = tuple("0123456789")

    def __init__(
        self,
        root: Any,
        train: bool = True,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Any = None,
        download: bool = False,
    ) -> None:
        if download:
            Path(root).mkdir(parents=True, exist_ok=True)  # scripts save their models there
        super().__init__(NUM_TRAINED if train else NUM_SCORED, (32, 32, 3), int(train), transform)


class MNIST(_Images):
    """Grey images of 28 by 28 pixels."""

    def __init__(
        self,
        root: Any,
        train: bool = True,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Any = None,
        download: bool = False,
    ) -> None:
        super().__init__(NUM_TRAINED if train else NUM_SCORED, (28, 28), int(train), transform)


class FakeData(_Images):
    """Like torchvision's: random images of a given size, channels first."""

    def __init__(
        self,
        size: int = 1000,
        image_size: tuple[int, int, int] = (3, 224, 224),
        num_classes: int = 10,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        channels, height, width = image_size
        super().__init__(size, (height, width, channels), 2, transform)
        self.targets = [target % num_classes for target in self.targets]
