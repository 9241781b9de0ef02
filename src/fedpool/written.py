"""Base of what the coordinator writes to the store as JSON: typed, frozen, and of one form in
bytes.
"""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from fedpool.errors import IntegrityError
from fedpool.store import Store, to_json


class Written(BaseModel):
    """Base of what the coordinator writes: frozen, strict, nothing unknown, and of one form in
    bytes.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, serialize_by_alias=True, validate_by_name=True
    )

    what: ClassVar[str] = "part of a record"
    """For messages."""

    def as_json(self) -> dict[str, Any]:
        """As it lies in the store."""
        return self.model_dump(mode="json")

    def to_bytes(self) -> bytes:
        """The bytes that lie in the store."""
        return to_json(self.as_json())

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """What some bytes of the store hold.

        Args:
            where: they lie, for the message.

        Raises:
            IntegrityError: they are of another kind.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise IntegrityError(f"{where} {_first(error, cls.what)}") from None

    @classmethod
    def read(cls, store: Store, path: str) -> Self:
        """What lies in the store.

        Raises:
            FileNotFoundError: nothing does.
            IntegrityError: it is of another kind.
        """
        return cls.from_bytes(store.read_bytes(path), store.full(path))


def _first(error: ValidationError, what: str) -> str:
    found = error.errors(include_url=False, include_context=False)[0]
    if found["type"] == "json_invalid":
        return f"is not JSON: {found['msg'].removeprefix('Invalid JSON: ')}"
    place = ".".join(str(part) for part in found["loc"])
    return f"does not describe {what}: {place + ': ' if place else ''}{found['msg']}"
