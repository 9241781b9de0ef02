"""A stand-in for torchvision, only for `nvflare_scripts.py`: generated images under the names that
NVFlare's examples use.

It downloads nothing, and accuracies with it mean nothing.
"""

from torchvision import datasets, transforms

__all__ = ["datasets", "transforms"]
