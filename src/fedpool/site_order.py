"""The order of sites, wherever one matters: natural order, in which `site-10` comes after
`site-2`.
"""

import re
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

_NUMBERS = re.compile(r"([0-9]+)")
T = TypeVar("T")

Key = tuple[tuple[str | int, ...], str]


def natural_key(name: str) -> Key:
    """What to sort the names of sites by: runs of digits count as numbers; `site-01` comes
    before `site-1`.
    """
    parts = _NUMBERS.split(name)  # text, digits, text, ...: text is only ever compared with text
    return tuple(int(part) if number % 2 else part for number, part in enumerate(parts)), name


def in_order(sites: Iterable[str]) -> list[str]:
    """Names of sites in natural order."""
    return sorted(sites, key=natural_key)


def by_site(items: Collection[T], site: Callable[[T], str]) -> list[T]:
    """Whatever belongs to sites in their natural order; what belongs to one site stays in its
    order.
    """
    return sorted(items, key=lambda item: natural_key(site(item)))
