"""A recipe's filters as a field: objects in a new recipe, JSON in a stored one.

The JSON names classes, `module:Class`. Only fedpool's own classes and those that installed packages
register are imported. A user's class must already be loaded (`fedpool.user_code`), which
takes permission.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from fedpool.errors import RecipeError
from fedpool.filters import Filter, described, type_of_filter

GROUP = "fedpool.filters"
"""The entry point group of installed packages' filters: `name = "package.module:Class"`."""


def is_registered(full: str) -> bool:
    """Whether an installed package registers a class, `module:Class`, as a filter."""
    return any(entry.value == full for entry in entry_points(group=GROUP))


def read_filters(value: Any) -> tuple[Filter, ...]:
    """The filters of a recipe: one or a list, each a filter or its JSON.

    Raises:
        RecipeError: a value is neither, or its class isn't known to this process.
    """
    if value is None:
        return ()
    several = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    return tuple(map(_read, several))


def _read(value: Any) -> Filter:
    if isinstance(value, Filter):
        own = type_of_filter(value)
        if _find(own) is not type(value):
            raise RecipeError(f"filter {own} cannot be imported by its path: define its class at the top of a module")
        return value
    full = str(value.get("type", "")) if isinstance(value, Mapping) else ""
    if not full:
        raise RecipeError(f"filters has {str(value)[:100]!r}, which is not a Filter: give instances of its subclasses")
    kind = _find(full)
    if kind is None:
        raise RecipeError(
            f"filter {full!r} is not known here: its module must come with the job, or be installed and registered ({GROUP})"
        )
    return kind(**{str(name): each for name, each in value.items() if name != "type"})


def _find(full: str) -> type[Filter] | None:
    module, _, name = full.partition(":")
    if module.startswith("fedpool.") or is_registered(full):
        try:
            import_module(module)
        except ImportError:
            return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Filter) else None


_SCHEMA = {
    "type": "array",
    "items": {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]},
}

Filters = Annotated[
    tuple[Filter, ...],
    BeforeValidator(read_filters),
    PlainSerializer(lambda filters: list(described(filters))),
    WithJsonSchema(_SCHEMA),
]
"""The field's type."""
