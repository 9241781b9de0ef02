"""Seeds the random generators of the script's libraries in each round."""

import random
import sys


def seed_everything(seed: int) -> None:
    """Seed random, and numpy and torch if the script has imported them."""
    random.seed(seed)
    for library in ("numpy", "torch"):
        if library in sys.modules:
            seed_library(library, seed)


def seed_library(library: str, seed: int) -> None:
    """Seed numpy or torch, which must be imported."""
    module = sys.modules[library]
    if library == "numpy":
        module.random.seed(seed % 2**32)
    elif module.accelerator.is_available():
        module.manual_seed(seed)
    else:  # the same generator; manual_seed() would take a traceback for each device library, 3 ms in total
        module.default_generator.manual_seed(seed)
