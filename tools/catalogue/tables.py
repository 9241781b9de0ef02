"""Tables in markdown, and the table of a recipe's fields."""

from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

_BLOCK = 2**20  # larger bounds are powers of two, and are shown as such
_BOUNDS = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}", "max_length": "up to {} characters"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def field_table(fields: Mapping[str, FieldInfo]) -> str:
    """The fields of a recipe: type with bounds, default, meaning."""
    return table(("field", "type", "default", "meaning"), (cells(name, field) for name, field in fields.items()))


def cells(name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    """The row of one field."""
    kind = ", ".join((f"`{_type(field.annotation)}`", *_bounds(field)))
    default = "required" if field.is_required() else f"`{_value(field.get_default(call_default_factory=True))}`"
    return f"`{name}`", kind, default, field.description or ""


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (None, NoneType):
        return "None"
    if annotation is Any:
        return "object"
    if annotation is Ellipsis:
        return "..."
    if origin in (Union, UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(_value(argument) for argument in arguments)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type(argument) for argument in arguments)}]"
    return str(annotation.__name__)


def _bounds(field: FieldInfo) -> list[str]:
    found = []
    for bound in field.metadata:
        for attribute, words in _BOUNDS.items():
            if (value := getattr(bound, attribute, None)) is not None:
                found.append(words.format(f"2^{value.bit_length() - 1}" if value > _BLOCK else f"{value:,}"))
        if getattr(bound, "min_length", None):
            found.append("not empty")
        if getattr(bound, "allow_inf_nan", None) is False:
            found.append("finite")
    return [" ".join(found)] if len(found) == 2 and found[1].startswith("to ") else found


def _value(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
