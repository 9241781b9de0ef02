"""Base of the JSON that the coordinator writes to the store: typed and frozen."""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from fedpool.errors import IntegrityError
from fedpool.store import Store, to_json


class Written(BaseModel):
    """Base of what the coordinator writes: frozen, strict, no unknown fields, one form in bytes."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, serialize_by_alias=True, validate_by_name=True
    )

    what: ClassVar[str] = "part of a record"
    """For messages."""

    def as_json(self) -> dict[str, Any]:
        """The JSON in the store."""
        return self.model_dump(mode="json")

    def to_bytes(self) -> bytes:
        """The bytes in the store."""
        return to_json(self.as_json())

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """The value that the store's bytes describe.

        Args:
            where: their place, for the message.

        Raises:
            IntegrityError: they describe something else.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise IntegrityError(f"{where} {_first(error, cls.what)}") from None

    @classmethod
    def read(cls, store: Store, path: str) -> Self:
        """Read the value from the store.

        Raises:
            FileNotFoundError: there is no such object.
            IntegrityError: the object describes something else.
        """
        return cls.from_bytes(store.read_bytes(path), store.full(path))


def _first(error: ValidationError, what: str) -> str:
    found = error.errors(include_url=False, include_context=False)[0]
    if found["type"] == "json_invalid":
        return f"is not JSON: {found['msg'].removeprefix('Invalid JSON: ')}"
    place = ".".join(str(part) for part in found["loc"])
    return f"does not describe {what}: {place + ': ' if place else ''}{found['msg']}"
