"""What a recipe passes on to client scripts: command lines, and the values of
`flare.get_config()`; checked when it is built.
"""

import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedpool.errors import RecipeError
from fedpool.paths import check_name

_ARGUMENTS = "train_args"
"""The key of a site's values that replaces the command line there."""


def split_arguments(arguments: str | Sequence[str], where: str) -> tuple[str, ...]:
    """A command line in words, as a shell would split it.

    Args:
        where: what to call it in an error.

    Raises:
        RecipeError: its quotes do not match.
    """
    if not isinstance(arguments, str):
        return tuple(str(argument) for argument in arguments)
    try:
        return tuple(shlex.split(arguments))
    except ValueError as error:
        raise RecipeError(
            f"{where} {arguments!r} cannot be split into words ({error}): balance its quotes, or give a list"
        ) from None


def site_arguments(per_site_config: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """site -> command line of its own, by the sites' values.

    Raises:
        RecipeError: a site's name or a value cannot be.
    """
    found: dict[str, tuple[str, ...]] = {}
    for site, config in per_site_config.items():
        check_name("site", site)
        where = f"per_site_config[{site!r}]"
        _check_json(where, config)
        if _ARGUMENTS in config:
            arguments = config[_ARGUMENTS]
            if not isinstance(arguments, str | list):
                raise RecipeError(f"{where}[{_ARGUMENTS!r}] must be a string or a list, got {arguments!r}")
            found[site] = split_arguments(arguments, f"{where}[{_ARGUMENTS!r}]")
    return found


def check_values(
    where: str, config: Mapping[str, Any], *, sets_itself: Collection[str], known: Collection[str]
) -> None:
    """Check the values for all sites.

    Args:
        where: what to call them in an error.
        sets_itself: names of the values that the recipe's algorithm gives.
        known: names of the recipe's fields.

    Raises:
        RecipeError: a value cannot be, or something else says it already.
    """
    _check_json(where, config)
    if _ARGUMENTS in config:
        raise RecipeError(f"{where}[{_ARGUMENTS!r}] is not a command line: give the recipe {_ARGUMENTS}=...")
    for name in sorted(set(config) & set(sets_itself)):
        remedy = f"give the recipe {name}=..." if name in known else "give it another name"
        raise RecipeError(f"{where}[{name!r}] is what the recipe's algorithm tells the client script: {remedy}")


def _check_json(where: str, config: Mapping[str, Any]) -> None:
    try:
        json.dumps(config, allow_nan=False)
    except ValueError:
        raise RecipeError(f"{where} holds NaN or infinity, which JSON cannot: {config}") from None
