"""The order of sites, wherever it matters: natural order, in which `site-2` precedes `site-10`."""

import re
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

_NUMBERS = re.compile(r"([0-9]+)")
T = TypeVar("T")

Key = tuple[tuple[str | int, ...], str]


def natural_key(name: str) -> Key:
    """Sort key for site names. Runs of digits count as numbers; `site-01` precedes `site-1`."""
    parts = _NUMBERS.split(name)  # text, digits, text, ...: so text is only compared with text
    return tuple(int(part) if number % 2 else part for number, part in enumerate(parts)), name


def in_order(sites: Iterable[str]) -> list[str]:
    """Names of sites in natural order."""
    return sorted(sites, key=natural_key)


def by_site(items: Collection[T], site: Callable[[T], str]) -> list[T]:
    """Items sorted by their sites, in natural order. Items of one site keep their order."""
    return sorted(items, key=lambda item: natural_key(site(item)))
