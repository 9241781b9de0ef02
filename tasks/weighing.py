"""Decides which updates of a round count, in what order and with what weight."""

import math
import sys
from collections.abc import Mapping, Sequence

from fedpool.errors import IntegrityError
from fedpool.tasks.arithmetic import Arithmetic
from fedpool.tasks.gate import Accepted
from fedpool.tasks.staleness import discount
from fedpool.tasks.used import counting

_HEAVIEST = 2.0 ** (sys.float_info.max_exp - 1)
_LIGHTEST = math.ulp(0.0)


class UpdateChanged(IntegrityError):
    """An update differs from the one that the gate checked: it was replaced, or is damaged."""

    def __init__(self, update: Accepted, what: str) -> None:
        super().__init__(what)
        self.site = update.site
        self.key = update.key


def in_their_order(updates: Sequence[Accepted], arithmetic: Arithmetic) -> list[Accepted]:
    """Updates in the order of their sites; of one site, the oldest first."""
    return arithmetic.by_site(sorted(updates, key=lambda update: update.manifest.round), lambda update: update.site)


def with_weights(
    updates: Sequence[Accepted], factors: Mapping[str, float], arithmetic: Arithmetic
) -> list[tuple[Accepted, float]]:
    """The updates that count, each with its weight: the weight that its site reports, times the
    site's factor and the discount of a late update.

    Args:
        factors: site -> factor on its weight; 1 for a site that is not named.
        arithmetic: of the job.
    """
    reported = {update.key: update.weight * discount(update.staleness) for update in updates}
    each = {update.key: factors.get(update.site, 1.0) for update in updates}
    shares = counting(reported, each)
    weights = _absolute(reported, each, shares) if arithmetic.absolute_weights else shares
    return [(update, weights[update.key]) for update in updates if shares[update.key]]


def _absolute(
    reported: Mapping[str, float], factors: Mapping[str, float], shares: Mapping[str, float]
) -> dict[str, float]:
    """Weights times factors, above 0.

    If the heaviest product overflows or underflows, it becomes the largest or the smallest normal
    power of two, and the others keep their ratios to it.

    Args:
        shares: the products relative to the heaviest, from `counting`.
    """
    weights = {key: weight * factors[key] for key, weight in reported.items()}
    heaviest = max(weights.values(), default=0.0)
    if math.isinf(heaviest):
        weights = {key: share * _HEAVIEST for key, share in shares.items()}
    elif heaviest < sys.float_info.min:
        weights = {key: share * sys.float_info.min for key, share in shares.items()}
    return {key: max(weight, _LIGHTEST) for key, weight in weights.items()}
