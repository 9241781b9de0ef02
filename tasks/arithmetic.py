"""How a job's numbers come about, where more than one way is right but only one gives the record's
bits.

`job.json` says which by the number `arithmetic`; one without it was begun before there was a
choice, and goes on as it began.
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
        number: as `job.json` has it.
        natural_order: sites count in natural order, `site-2` before `site-10`; before, by the
            characters of their names.
        exact_products: inner products of updates are symmetric, and the same on every processor;
            before, they were BLAS's.
        scaled_extras: what limits an update's difference limits what a strategy makes of its
            extras, too.
        idle_sites: an update that says of itself that no step was taken has weight 0; before, it
            was rejected.
        eval_examples: an update's metrics count with the examples that its `meta` says they are of;
            before, that had no meaning.
    """

    number: int

    @property
    def natural_order(self) -> bool:
        """See the class."""
        return self.number >= 2

    exact_products = scaled_extras = idle_sites = eval_examples = natural_order

    @classmethod
    def numbered(cls, number: int) -> Self:
        """A version by its number.

        Raises:
            ValueError: it is of a later version than this one knows.
        """
        if number not in (1, 2):
            raise ValueError(f"arithmetic {number} is not known here: a later version of fedpool wrote this job")
        return cls(number)

    def ordered(self, sites: Collection[str]) -> list[str]:
        """Names of sites in their order."""
        return in_order(sites) if self.natural_order else sorted(sites)

    def by_site(self, items: Collection[T], site: Callable[[T], str]) -> list[T]:
        """Whatever belongs to sites in their order."""
        return by_site(items, site) if self.natural_order else sorted(items, key=site)


BEFORE = Arithmetic(1)
CURRENT = Arithmetic(2)
