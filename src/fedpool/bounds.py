"""The bounds on what a site says beside its tensors: how many values, how long, how large.

They are in one place because three sides use them. A script that names too many values is told at
once, its host leaves out what can't be sent, and the gate rejects whatever exceeds them all the
same, because a site need not run our code.
"""

import math
from collections.abc import Mapping
from typing import Any

from fedpool.errors import RecipeError
from fedpool.storable import MAX_TEXT

MAX_VALUES = 1_000
"""Limit on the metrics of an update, on its logged scalars, and on the entries of its meta."""
MAX_NAME = 250
"""Limit on the characters of a value's name, as in MLflow."""
MAX_NUMBER = 1e100
"""Limit on the absolute value of a number. No sum, square or product of a few such overflows."""
MAX_SECONDS = 1e9
"""Limit on the duration of a site's part of a round: 30 years."""
MAX_WEIGHT = 1e12
"""Default limit on an update's weight. More steps or rows than that are a mistake or a lie."""
MIN_DIVISOR, MAX_DIVISOR = 1e-12, 1e12
"""Limits on a number in meta that a recipe's algorithm needs and may divide by, such as steps."""


Range = tuple[float | None, float | None]
"""The lowest and the highest value of a metric; None: no limit."""


def fits(value: float) -> bool:
    """Whether a number is finite and not too large."""
    return abs(value) <= MAX_NUMBER


def too_many(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the number of values and their names; None if nothing is."""
    if len(values) > MAX_VALUES:
        return f"it has {len(values)} entries, but at most {MAX_VALUES} are allowed"
    for name in values:
        if len(name) > MAX_NAME:
            return f"the name {name[:40]!r}... has {len(name)} characters, but at most {MAX_NAME} are allowed"
    return None


def too_large(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the values themselves; None if nothing is."""
    for name, value in values.items():
        if isinstance(value, str):
            if len(value) > MAX_TEXT:
                return f"{name} has {len(value)} characters, but at most {MAX_TEXT} are allowed"
        elif value is not None and not fits(value):
            return f"{name} is {str(value)[:100]}: the absolute value of a number may be at most {MAX_NUMBER:g}"
    return None


def out_of_range(values: Mapping[str, float | None], ranges: Mapping[str, Range]) -> str | None:
    """What is outside its range; None if nothing is. A value that is missing or None isn't."""
    for name, (low, high) in ranges.items():
        value = values.get(name)
        if value is None:
            continue
        if (low is not None and value < low) or (high is not None and value > high):
            return f"{name} is {value:g}, but metric_ranges says {_told((low, high))}"
    return None


def check_ranges(ranges: Mapping[str, Range]) -> Mapping[str, Range]:
    """Return the ranges of metrics if they are valid.

    Raises:
        RecipeError: a range has no limit or is empty, or a limit is not finite.
    """
    for metric, (low, high) in ranges.items():
        known = [limit for limit in (low, high) if limit is not None]
        if not known or not all(map(math.isfinite, known)) or known != sorted(known):
            raise RecipeError(
                f"metric_ranges[{metric!r}] must have a lowest and a highest value, one of which may be None, "
                f"got {_told((low, high))}"
            )
    return ranges


def _told(limits: Range) -> str:
    return " to ".join("any" if limit is None else f"{limit:g}" for limit in limits)


def as_float(value: float) -> float:
    """A number as a float; an integer that is too large for one is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
