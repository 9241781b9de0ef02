"""Chooses the sites of a round: a function of the seed, the round and the set of sites only."""

import random
from collections.abc import Collection

from fedpool.site_order import in_order


def choose_sites(seed: int, round: int, sites: Collection[str], count: int | None) -> tuple[str, ...]:
    """The sites of a round, in natural order: all of them, or `count` drawn without replacement.

    Args:
        seed: of the job.
        round: from 0.
        sites: names, in any order.
        count: number of sites; None for all.
    """
    if count is None or count >= len(sites):
        return tuple(in_order(sites))
    # A string seeds the generator through sha512, so the draw is the same on every machine and for
    # every hash seed. It depends only on the names in character order: any order would do, and
    # earlier versions used this one.
    return tuple(in_order(random.Random(f"sampling/{seed}/{round}").sample(sorted(sites), count)))
