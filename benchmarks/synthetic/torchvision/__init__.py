"""A stand-in for torchvision, for `nvflare_scripts.py` alone: made-up images under the names that
NVFlare's examples use.

It downloads nothing, and no figure of accuracy means anything with it.
"""

from torchvision import datasets, transforms

__all__ = ["datasets", "transforms"]
