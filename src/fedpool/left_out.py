"""Conditions to leave a field out of JSON, for pydantic's `exclude_if`.

Values from earlier versions, which lack the field, so keep their bytes.
"""

from collections.abc import Collection


def is_none(value: object) -> bool:
    """Leave out None."""
    return value is None


def is_empty(value: Collection[object]) -> bool:
    """Leave out an empty collection."""
    return not value


def is_false(value: object) -> bool:
    """Leave out False."""
    return value is False
