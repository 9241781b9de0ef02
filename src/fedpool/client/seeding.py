"""The generators of the libraries that a script uses, seeded for each round."""

import random
import sys


def seed_everything(seed: int) -> None:
    """Seed the generators of the libraries that the script has imported: random, numpy, torch."""
    random.seed(seed)
    for library in ("numpy", "torch"):
        if library in sys.modules:
            seed_library(library, seed)


def seed_library(library: str, seed: int) -> None:
    """Seed the generator of numpy or of torch, which has been imported."""
    module = sys.modules[library]
    if library == "numpy":
        module.random.seed(seed % 2**32)
    elif module.accelerator.is_available():
        module.manual_seed(seed)
    else:  # the same generator; manual_seed() would take a traceback for each device library, 3 ms together
        module.default_generator.manual_seed(seed)
