"""What users build from fields: recipes, environments and site settings.

Invalid fields are refused in fedpool's words: pydantic's text has a link and a type code, which
don't help someone who mistyped a name.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from fedpool.as_imported import note_imports
from fedpool.errors import RecipeError

_MAX_VALUE = 200


class FieldsError(ValidationError, RecipeError):
    """Invalid fields: all of them, each with its name, its value and the remedy."""

    # `from_exception_data` creates pydantic's errors, and has no parameter for our text.
    text: str

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"FieldsError({self.text!r})"

    def __reduce__(self) -> tuple[type[RecipeError], tuple[str]]:
        return RecipeError, (self.text,)


class Checked(BaseModel):
    """Base of the models that a user builds.

    Raises:
        FieldsError (a RecipeError, a ValueError and a pydantic.ValidationError): a field is
            invalid.
    """

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        note_imports(cls.__module__)

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise fields_error(type(self), error, data) from None

    if not TYPE_CHECKING:  # type checkers must refuse positional values too, and show the fields as the signature

        def __new__(cls, *values: Any, **data: Any) -> Self:
            if values:
                fields = cls.model_fields
                first = next((name for name, field in fields.items() if field.is_required()), next(iter(fields)))
                raise RecipeError(
                    f"{cls.__name__} takes its fields by name, got {_brief(values[0])} without one: "
                    f"write {cls.__name__}({first}=...) if you mean {first}"
                )
            return super().__new__(cls)

    # Tells pydantic that this `__init__` only wraps its own, so nested and restored models are
    # validated without it.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    if not TYPE_CHECKING:  # type checkers must still refuse unknown and frozen attributes

        def __setattr__(self, name: str, value: Any) -> None:
            try:
                super().__setattr__(name, value)
            except ValidationError as error:
                kind = type(self).__name__
                text = f"{kind}.{name} cannot be set, because a {kind} is frozen: build a new one with {name}={value!r}"
                raise _fields_error(error, text) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise fields_error(cls, error, obj if isinstance(obj, Mapping) else {}) from None


def fields_error(kind: type[BaseModel], error: ValidationError, data: Mapping[str, Any]) -> FieldsError:
    """Pydantic's errors about a model's fields, in fedpool's words.

    Args:
        kind: the model.
        data: the values that it was built from.
    """
    found = list(describe_problems(kind, error, data))
    head = kind.__name__
    text = f"{head}: {found[0]}" if len(found) == 1 else "\n  ".join([f"{head} has {len(found)} problems:", *found])
    return _fields_error(error, text)


def _fields_error(error: ValidationError, text: str) -> FieldsError:
    details = [
        InitErrorDetails(
            type=PydanticCustomError(entry["type"], "{text}", {**entry.get("ctx", {}), "text": entry["msg"]}),
            loc=entry["loc"],
            input=entry["input"],
        )
        for entry in error.errors(include_url=False)
    ]
    made = FieldsError.from_exception_data(error.title, details, hide_input=True)
    assert isinstance(made, FieldsError)
    made.text = text
    return made


def describe_problems(kind: type[BaseModel], error: ValidationError, data: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each invalid place: where, what is wrong, and the value.

    Args:
        kind: the model.
        data: the values that it was built from.
    """
    at: dict[str, list[str]] = {}
    values: dict[str, str] = {}
    for entry in error.errors(include_url=False):
        name = str(entry["loc"][0]) if entry["loc"] else ""
        where = _where(entry["loc"], data)
        if entry["type"] == "extra_forbidden":
            at.setdefault(where, []).append(_not_known(kind, entry["loc"], where))
        elif entry["type"] == "missing":
            at.setdefault(where, []).append("is required, but was not given")
        elif entry["type"] == "value_error":
            at.setdefault(where, []).append(str(entry["ctx"]["error"]))
        else:
            at.setdefault(where, []).append(_plain(entry["msg"]))
            if not _is_secret(kind.model_fields.get(name)):
                values[where] = _brief(entry["input"])
    for where, said in at.items():
        what = ", or ".join(dict.fromkeys(said)) + (f", got {values[where]}" if where in values else "")
        begins = re.match(rf"(a |an |the )?{re.escape(where)}\b", what)
        # fedpool's own checks already name the field.
        yield what if not where or begins else f"{where}: {what}"


def one_or_many(value: Any) -> Any:
    """A string as a tuple of one; None as an empty tuple."""
    return () if value is None else (value,) if isinstance(value, str) else value


def none_is_empty(value: Any) -> Any:
    """None as an empty mapping."""
    return {} if value is None else value


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name closest to an unknown one; None if none is similar."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


def _not_known(kind: type[BaseModel], loc: Sequence[int | str], where: str) -> str:
    name = str(loc[0]) if loc else ""
    if len(loc) < 2:
        return _unknown(name, kind.model_fields)
    field = kind.model_fields.get(name)
    inner = field.annotation if field is not None else None
    if len(loc) == 2 and isinstance(inner, type) and issubclass(inner, BaseModel):
        text = _unknown(str(loc[1]), inner.model_fields)
        return f"{loc[1]}: {text}" if where == name else text
    return "is not known here"


def _unknown(name: str, fields: Mapping[str, FieldInfo]) -> str:
    if (meant := nearest(name, fields)) is not None:
        return f"did you mean {meant}? There is no such field"
    return f"there is no such field: use one of {', '.join(fields)}"


def _where(loc: Sequence[int | str], data: Mapping[str, Any]) -> str:
    """Where in the given values a problem is, without the names of types that pydantic tried."""
    where = str(loc[0]) if loc else ""
    value: Any = data.get(where)
    for part in loc[1:]:
        holds = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if holds or (isinstance(value, Mapping) and part in value):
            value = value[part]
            where += f"[{part!r}]"
    return where


def _plain(message: str) -> str:
    message = re.sub(r",? (unable to parse|got a number with a|after validation, not) .*", "", message)
    return re.sub(r"^(Input|Value|String|List|Tuple|Set|Dictionary|Data) should ", "must ", message)


def _is_secret(info: FieldInfo | None) -> bool:
    return info is not None and (not info.repr or "SecretStr" in str(info.annotation) or info.annotation is SecretStr)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]} ..."
