"""Which sites take part in a round: a function of (seed, round) and the set of sites, nothing
else.
"""

import random
from collections.abc import Collection

from fedpool.site_order import in_order


def choose_sites(seed: int, round: int, sites: Collection[str], count: int | None) -> tuple[str, ...]:
    """The sites of a round, in natural order: all of them, or `count` drawn without replacement.

    Args:
        seed: of the job.
        round: from 0.
        sites: names; their order does not matter.
        count: how many; None for all.
    """
    if count is None or count >= len(sites):
        return tuple(in_order(sites))
    # A string seeds the generator through sha512, so the draw is the same on every machine and for
    # every hash seed. What is drawn is a matter of the names alone, sorted by their characters: any
    # order would do, and this one was first.
    return tuple(in_order(random.Random(f"sampling/{seed}/{round}").sample(sorted(sites), count)))
