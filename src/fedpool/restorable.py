"""How a recipe is made of one that was there: as a job's record has it, or with fields changed."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import PrivateAttr, ValidationInfo
from pydantic_core import to_jsonable_python

from fedpool.bundle import Bundle
from fedpool.fields import Checked


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a recipe has, beside its fields, of the one that it is made of.

    Attributes:
        bundle: its client script and modules.
        given: names of the fields that the user chose; None when nobody knows.
        changed: names of the fields that are not as they were there.
    """

    bundle: Bundle
    given: frozenset[str] | None
    changed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, info: ValidationInfo) -> Self | None:
        """What the recipe that is being checked has inherited; None for a new one."""
        return info.context if isinstance(info.context, cls) else None


class Restorable(Checked):
    """What is done with a recipe that is there, of which this is a base."""

    _bundle: Bundle = PrivateAttr()
    _given: frozenset[str] | None = PrivateAttr()

    @classmethod
    def restore(cls, fields: Mapping[str, Any], bundle: Bundle, *, given: Collection[str] | None = None) -> Self:
        """A recipe whose script is bundled already, as a job in the store has it; checked as any.

        Args:
            fields: of the recipe.
            bundle: takes the place of `train_script` and `include`, which need not be there any
                more.
            given: names of the fields that the user chose; None when nobody knows, as of a job of
                an earlier version.
        """
        chosen = None if given is None else frozenset(given) & cls.model_fields.keys()  # an earlier version had others
        return cls.model_validate(dict(fields), context=Inherited(bundle, chosen))

    @classmethod
    def recorded(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a recipe as `job.json` has them, and those that it lacks, with what they
        meant when it was written.
        """
        found = {
            name: to_jsonable_python(field.get_default(call_default_factory=True))
            for name, field in cls.model_fields.items()
            if not field.exclude and not field.is_required()
        }
        return found | dict(cls.earlier(fields)) | dict(fields)

    @classmethod
    def earlier(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """What fields that a job of an earlier version may lack meant, if not their default.

        Args:
            fields: that it has.
        """
        return {}

    def revise(self, **fields: Any) -> Self:
        """The same recipe with some fields changed, checked anew; the client script and the
        modules that it imports stay.
        """
        kept = {name: getattr(self, name) for name in type(self).model_fields}
        changed = frozenset(name for name, value in fields.items() if name not in kept or kept[name] != value)
        given = None if self._given is None else self._given | changed
        return type(self).model_validate({**kept, **fields}, context=Inherited(self._bundle, given, changed))

    @property
    def given(self) -> frozenset[str] | None:
        """Names of the fields that the user chose; None when nobody knows."""
        return self._given

    @property
    def bundle(self) -> Bundle:
        """The client script and its modules."""
        return self._bundle
