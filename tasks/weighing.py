"""Which updates of a round count, in what order and with what weight; and the error that one of
them was changed meanwhile.
"""

from collections.abc import Mapping, Sequence

from fedpool.errors import IntegrityError
from fedpool.tasks.arithmetic import Arithmetic
from fedpool.tasks.gate import Accepted
from fedpool.tasks.staleness import discount
from fedpool.tasks.used import counting


class UpdateChanged(IntegrityError):
    """An update is not what the gate has seen: its site has changed it since, or the store is
    damaged.
    """

    def __init__(self, update: Accepted, what: str) -> None:
        super().__init__(what)
        self.site = update.site
        self.key = update.key


def in_their_order(updates: Sequence[Accepted], arithmetic: Arithmetic) -> list[Accepted]:
    """Updates in the order of their sites; of one site, the older one first."""
    return arithmetic.by_site(sorted(updates, key=lambda update: update.manifest.round), lambda update: update.site)


def with_weights(updates: Sequence[Accepted], factors: Mapping[str, float]) -> list[tuple[Accepted, float]]:
    """The updates that count, each with its weight, relative to the heaviest; a late one's is
    discounted.

    Args:
        factors: site -> factor on its weight; 1 for a site that is not named.
    """
    weights = counting(
        {update.key: update.weight * discount(update.staleness) for update in updates},
        {update.key: factors.get(update.site, 1.0) for update in updates},
    )
    return [(update, weight) for update in updates if (weight := weights[update.key])]
