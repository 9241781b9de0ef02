"""`exclude_vars`: the parameters that stay at the sites."""

import re
from collections.abc import Collection

from fedpool.errors import RecipeError


def excluded(patterns: Collection[str], names: Collection[str]) -> set[str]:
    """The names in which a pattern is found."""
    return {name for name in names for pattern in patterns if re.search(pattern, name)}


def check_excluded(patterns: Collection[str], names: Collection[str]) -> None:
    """Check patterns against the parameters of a model.

    Raises:
        RecipeError: a pattern isn't a regular expression or matches no parameter, or nothing is
            left to train.
    """
    for pattern in patterns:
        try:
            found = excluded([pattern], names)
        except re.error as error:
            raise RecipeError(f"exclude_vars {pattern!r} is not a regular expression: {error}") from None
        if not found:
            raise RecipeError(f"exclude_vars {pattern!r} matches no parameter: {', '.join(sorted(names)[:8])}")
    if excluded(patterns, names) >= set(names):
        raise RecipeError(f"exclude_vars {list(patterns)} leaves no parameter to train together")
