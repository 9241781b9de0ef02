"""The errors of verification: something in the store is wrong."""

from fedpool.errors import IntegrityError
from fedpool.store import Store


def differs(store: Store, path: str, how: str) -> IntegrityError:
    """The error for an object in the store that is wrong."""
    return IntegrityError(f"{store.full(path)} {how}")


def says_otherwise(store: Store, path: str, name: str, *, said: object, found: object) -> IntegrityError:
    """The error for a field of a record that doesn't follow from the rest of the store."""
    return differs(store, path, f"says {name} {_brief(said)}, but it should be {_brief(found)}")


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
