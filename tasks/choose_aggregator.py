"""Converts the aggregator of a recipe from user input, and to the form in `job.json`."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator

from fedpool.errors import RecipeError
from fedpool.fields import nearest
from fedpool.tasks.aggregator import Aggregator
from fedpool.tasks.aggregators import (
    AGGREGATORS,
    Bulyan,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    NormClippedMean,
    Rule,
    TrimmedMean,
)
from fedpool.tasks.own_function import OwnFunction, of_path, path_of

Given = Aggregator | str | Callable[..., Any] | Mapping[str, Any]
"""What a user may write: `Krum(num_byzantine=2)`, "median", a function or its path, or {"kind":
"krum", "num_byzantine": 2}.
"""


def chosen(given: Given) -> Aggregator:
    """The aggregator that a user asked for.

    Raises:
        RecipeError: the name is unknown, or a parameter is missing, unknown or out of bounds.
    """
    if isinstance(given, Rule | OwnFunction):
        return given
    if isinstance(given, str):
        if ":" not in given:
            return _made(given, {})
        return of_path(given)
    if isinstance(given, Mapping):
        if not isinstance(kind := given.get("kind"), str):
            raise RecipeError(f'aggregator {dict(given)!r} has no "kind": give one of {_known()}')
        return _made(kind, {name: value for name, value in given.items() if name != "kind"})
    if isinstance(given, type) and issubclass(given, Rule):  # Krum instead of Krum(num_byzantine=...)
        return _made(given.model_fields["kind"].default, {})
    if callable(given):
        return of_path(path_of(given))
    raise RecipeError(
        f"aggregator={given!r} cannot be used: give a name, an instance such as Krum(num_byzantine=...), or a function"
    )


def written(aggregator: Aggregator | str) -> str | dict[str, Any]:
    """An aggregator as in `job.json`: its name if that suffices, its fields, or its path."""
    if isinstance(aggregator, str):  # the field's default, which a schema shows
        return aggregator
    if isinstance(aggregator, OwnFunction):
        return aggregator.path
    assert isinstance(aggregator, Rule), "`chosen` returns nothing else"
    fields: dict[str, Any] = aggregator.model_dump(mode="json")
    return aggregator.kind if fields.keys() == {"kind"} else fields


def plain_names() -> list[str]:
    """The aggregators that need no parameters, so their name suffices."""
    return [name for name, kind in AGGREGATORS.items() if not _needed(kind)]


def _made(name: str, fields: Mapping[str, Any]) -> Rule:
    kind = AGGREGATORS.get(name)
    if kind is None:
        meant = nearest(name, AGGREGATORS)
        ask = "" if meant is None else f' Did you mean "{meant}"?'
        raise RecipeError(
            f'aggregator "{name}" is unknown.{ask} Use {_known()}, or the path of a function, "package.module:function"'
        )
    if missing := [field for field in _needed(kind) if field not in fields]:
        call = f"{kind.__name__}({', '.join(f'{field}=...' for field in missing)})"
        in_json = f'"kind": "{name}"' + "".join(f', "{field}": ...' for field in missing)
        raise RecipeError(f'aggregator "{name}" needs {", ".join(missing)}: {call}, or in JSON {{{in_json}}}')
    try:
        return kind.model_validate({"kind": name, **fields})
    except RecipeError as error:
        raise RecipeError(f"aggregator: {error}") from None


def _needed(kind: type[Rule]) -> list[str]:
    return [name for name, field in kind.model_fields.items() if field.is_required()]


def _known() -> str:
    return ", ".join(AGGREGATORS)


# Prefect's form supports only `anyOf`, and takes the first match: a name, then the aggregator with
# the fewest fields.
_Form = (
    Annotated[
        str, Field(title="name or function", description=f"{', '.join(plain_names())}, or package.module:function")
    ]
    | Mean
    | Median
    | Krum
    | MultiKrum
    | Bulyan
    | TrimmedMean
    | GeometricMedian
    | NormClippedMean
)

AggregatorField = Annotated[
    Given,
    PlainValidator(chosen, json_schema_input_type=_Form),
    PlainSerializer(written),
]
"""The type of a recipe's field. Whatever the user gives, the recipe has an `Aggregator`."""
