"""Versions of the arithmetic: several are correct, but only one reproduces a record's bits.

`arithmetic` in `job.json` is the version's number. Jobs from before there was a choice lack it, and
keep the version that they began with.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Self, TypeVar

from fedpool.site_order import by_site, in_order

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A version of the arithmetic.

    Attributes:
        number: as in `job.json`.
        natural_order: sites are in natural order, `site-2` before `site-10`; in version 1, in
            character order.
        exact_products: inner products of updates are symmetric, and the same on every processor; in
            version 1, BLAS computed them.
        scaled_extras: clipping an update's difference also scales what the strategy derives from
            its extras.
        idle_sites: an update that reports that no step was taken has weight 0; in version 1, it was
            rejected.
        eval_examples: an update's metrics are weighted by the number of examples in its `meta`; in
            version 1, that had no meaning.
        absolute_weights: a strategy gets the absolute weights of updates; in versions 1 and 2,
            their weights relative to the heaviest of the round.
        bounded: an update with too many, too long or too large values beside its tensors is
            rejected; versions 1 to 3 took whatever a manifest held.
    """

    number: int

    @property
    def natural_order(self) -> bool:
        """See the class."""
        return self.number >= 2

    exact_products = scaled_extras = idle_sites = eval_examples = natural_order

    @property
    def absolute_weights(self) -> bool:
        """See the class."""
        return self.number >= 3

    @property
    def bounded(self) -> bool:
        """See the class."""
        return self.number >= 4

    @classmethod
    def numbered(cls, number: int) -> Self:
        """The version with a number.

        Raises:
            ValueError: this version of fedpool doesn't know it.
        """
        if number not in (1, 2, 3, 4):
            raise ValueError(
                f"arithmetic {number} is unknown: a later version of fedpool wrote this job, so use that version"
            )
        return cls(number)

    def ordered(self, sites: Collection[str]) -> list[str]:
        """Names of sites in their order."""
        return in_order(sites) if self.natural_order else sorted(sites)

    def by_site(self, items: Collection[T], site: Callable[[T], str]) -> list[T]:
        """Items that belong to sites, in the order of the sites."""
        return by_site(items, site) if self.natural_order else sorted(items, key=site)


BEFORE = Arithmetic(1)
CURRENT = Arithmetic(4)
