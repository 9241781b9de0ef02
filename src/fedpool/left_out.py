"""When a field is left out of JSON, so that values of earlier versions keep their bytes: for
pydantic's `exclude_if`.
"""

from collections.abc import Collection


def is_none(value: object) -> bool:
    """For `exclude_if`: a field that an earlier version lacks, or that there is no use for, is
    left out.
    """
    return value is None


def is_empty(value: Collection[object]) -> bool:
    """See `is_none`."""
    return not value


def is_false(value: object) -> bool:
    """See `is_none`."""
    return value is False
