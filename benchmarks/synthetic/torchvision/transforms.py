"""The transforms that NVFlare's examples use."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class ToTensor:
    """Bytes, with channels last or no channels, to floats from 0 to 1 with channels first."""

    def __call__(self, image: Any) -> torch.Tensor:
        tensor = torch.as_tensor(image).float() / 255
        return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()


class Normalize:
    """(x - mean) / std for each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self.mean) / self.std


class Pad:
    """A frame around the image."""

    def __init__(self, padding: int, padding_mode: str = "constant") -> None:
        self.padding, self.mode = padding, padding_mode

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(image[None], [self.padding] * 4, mode=self.mode)[0]


class RandomCrop:
    """A random square of the image."""

    def __init__(self, size: int, padding: int = 0) -> None:
        self.size, self.pad = size, Pad(padding)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        image = self.pad(image)
        top, left = (int(torch.randint(0, side - self.size + 1, ())) for side in image.shape[1:])
        return image[:, top : top + self.size, left : left + self.size]


class RandomHorizontalFlip:
    """The image, or its mirror image."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(-1) if torch.rand(()) < 0.5 else image
