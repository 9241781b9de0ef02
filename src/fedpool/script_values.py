"""The command lines and `flare.get_config()` values that a recipe passes to client scripts."""

import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedpool.errors import RecipeError
from fedpool.paths import check_name

_ARGUMENTS = "train_args"
"""The key in a site's values that replaces the command line for this site."""


def split_arguments(arguments: str | Sequence[str], where: str) -> tuple[str, ...]:
    """Split a command line into words, as a shell would.

    Args:
        where: its name, for the error message.

    Raises:
        RecipeError: its quotes don't match.
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
    """Site -> command line, for the sites whose values set one.

    Raises:
        RecipeError: a site's name or a value is invalid.
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
        where: their name, for the error message.
        sets_itself: names of the values that the recipe's algorithm sets.
        known: names of the recipe's fields.

    Raises:
        RecipeError: a value is invalid, or is set elsewhere.
    """
    _check_json(where, config)
    if _ARGUMENTS in config:
        raise RecipeError(
            f"{where}[{_ARGUMENTS!r}] would not be used as a command line: give the recipe {_ARGUMENTS}=..."
        )
    for name in sorted(set(config) & set(sets_itself)):
        remedy = f"give the recipe {name}=..." if name in known else "give it another name"
        raise RecipeError(f"{where}[{name!r}] is set by the recipe's algorithm: {remedy}")


def _check_json(where: str, config: Mapping[str, Any]) -> None:
    try:
        json.dumps(config, allow_nan=False)
    except ValueError:
        raise RecipeError(f"{where} holds NaN or infinity, which JSON cannot represent: {config}") from None
