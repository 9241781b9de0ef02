"""The convolutional network of PyTorch's CIFAR-10 tutorial."""

import torch
from torch import nn


class Net(nn.Module):
    """Input (batch, 3, 32, 32), output (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores of a batch of images."""
        images = self.pool(torch.relu(self.conv1(images)))
        images = self.pool(torch.relu(self.conv2(images)))
        images = torch.flatten(images, 1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(images)))))
