"""The errors of a verification: something in the store is not what it should be."""

from fedpool.errors import IntegrityError
from fedpool.store import Store


def differs(store: Store, path: str, how: str) -> IntegrityError:
    """The error that something in the store is not what it says."""
    return IntegrityError(f"{store.full(path)} {how}")


def says_otherwise(store: Store, path: str, name: str, *, said: object, found: object) -> IntegrityError:
    """The error that a field of a record is not what follows from the rest of the store."""
    return differs(store, path, f"says {name} {_brief(said)}, but it should be {_brief(found)}")


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
