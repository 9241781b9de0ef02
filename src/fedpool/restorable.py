"""Makes a recipe from an existing one: restored from a job's record, or with fields changed."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import PrivateAttr, ValidationInfo
from pydantic_core import to_jsonable_python

from fedpool.bundle import Bundle
from fedpool.fields import Checked


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a recipe takes over from the one that it is made from, in addition to its fields.

    Attributes:
        bundle: the client script and its modules.
        given: names of the fields that the user set; None if unknown.
        changed: names of the fields with a new value.
    """

    bundle: Bundle
    given: frozenset[str] | None
    changed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, info: ValidationInfo) -> Self | None:
        """The inheritance of the recipe being validated; None if it is a new one."""
        return info.context if isinstance(info.context, cls) else None


class Restorable(Checked):
    """Base of recipes: restores and revises them."""

    _bundle: Bundle = PrivateAttr()
    _given: frozenset[str] | None = PrivateAttr()

    @classmethod
    def restore(cls, fields: Mapping[str, Any], bundle: Bundle, *, given: Collection[str] | None = None) -> Self:
        """Restore the recipe of a stored job; it is validated like any other.

        Args:
            fields: the recipe's fields.
            bundle: replaces `train_script` and `include`, whose files needn't exist any more.
            given: names of the fields that the user set; None if unknown, as for jobs of earlier
                versions.
        """
        chosen = None if given is None else frozenset(given) & cls.model_fields.keys()  # earlier versions had others
        return cls.model_validate(dict(fields), context=Inherited(bundle, chosen))

    @classmethod
    def recorded(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields in `job.json`, and those missing there with the values that applied then."""
        found = {
            name: to_jsonable_python(field.get_default(call_default_factory=True))
            for name, field in cls.model_fields.items()
            if not field.exclude and not field.is_required()
        }
        return found | dict(cls.earlier(fields)) | dict(fields)

    @classmethod
    def earlier(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Values of fields that jobs of earlier versions lack, if they aren't today's defaults.

        Args:
            fields: the fields that the job has.
        """
        return {}

    def revise(self, **fields: Any) -> Self:
        """The same recipe with some fields changed, validated again; the bundle stays the same."""
        kept = {name: getattr(self, name) for name in type(self).model_fields}
        changed = frozenset(name for name, value in fields.items() if name not in kept or kept[name] != value)
        given = None if self._given is None else self._given | changed
        return type(self).model_validate({**kept, **fields}, context=Inherited(self._bundle, given, changed))

    @property
    def given(self) -> frozenset[str] | None:
        """Names of the fields that the user set; None if unknown."""
        return self._given

    @property
    def bundle(self) -> Bundle:
        """The client script and its modules."""
        return self._bundle
