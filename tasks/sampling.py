"""Which sites take part in a round: a function of (seed, round) and the set of sites, nothing else."""

import random
from collections.abc import Collection


def choose_sites(seed: int, round: int, sites: Collection[str], count: int | None) -> tuple[str, ...]:
    """The sites of a round, sorted: all of them, or `count` drawn without replacement.

    Args:
        seed: of the job.
        round: from 0.
        sites: names; their order does not matter.
        count: how many; None for all.
    """
    names = sorted(sites)
    if count is None or count >= len(names):
        return tuple(names)
    # A string seeds the generator through sha512, so the draw is the same on every machine and for every hash seed.
    return tuple(sorted(random.Random(f"sampling/{seed}/{round}").sample(names, count)))
