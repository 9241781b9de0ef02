"""An aggregator that is a user's function, named by its import path."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedpool.as_imported import check_function, note_imports
from fedpool.errors import RecipeError, RoundError
from fedpool.own_failures import OWN_FAILURES, told
from fedpool.tasks.aggregator import Aggregator, stacked
from fedpool.tasks.strategy import State, Update

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""((n, elements) values, (n,) weights, as in `Update`), both float64, to (elements,)."""


@dataclass(frozen=True)
class OwnFunction(Aggregator):
    """A user's function, named by its import path."""

    path: str

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        weights = torch.tensor([update.weight for update in updates], dtype=torch.float64)
        values = stacked(name, updates)
        function = imported(self.path)
        try:
            found = function(values, weights)
        except OWN_FAILURES as error:
            raise RoundError(f"aggregator {self.path} failed at parameter {name}: {told(error)}") from error
        if not isinstance(found, torch.Tensor) or found.shape != values.shape[1:]:
            what = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise RoundError(
                f"aggregator {self.path} must return a tensor of shape {list(values.shape[1:])}, but it returned {what}"
            )
        if found.is_complex() or not bool(found.isfinite().all()):
            raise RoundError(
                f"aggregator {self.path} returned {'complex numbers' if found.is_complex() else 'NaN or infinity'} for parameter "
                f"{name}, although every update is finite: look for divisions by 0 and values that are too large"
            )
        return found.to(torch.float64)


def imported(path: str) -> Function:
    """The function at an import path, `package.module:function`.

    Raises:
        RecipeError: it can't be imported here.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except OWN_FAILURES as error:  # the module may be the user's
        why = error if isinstance(error, (ImportError, AttributeError, ValueError)) else told(error)
        raise RecipeError(
            f"aggregator {path!r} cannot be imported ({why}): give 'package.module:function', installed where the "
            "coordinator runs"
        ) from None
    if not callable(function):
        raise RecipeError(f"aggregator {path!r} is a {type(function).__name__}: give the path of a function")
    return function  # type: ignore[no-any-return]


def path_of(function: Callable[..., Any]) -> str:
    """The import path of a function.

    Raises:
        RecipeError: it has none, like a lambda or a function inside another.
    """
    path = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    if "<" in path or imported(path) is not function:  # <lambda>, <locals>
        raise RecipeError(f"aggregator {function!r} cannot be imported by its path {path!r}: put it into a module")
    return path


def of_path(path: str) -> OwnFunction:
    """The aggregator of an import path; fails now rather than in the first round.

    Raises:
        RecipeError: it can't be imported here, or its file has changed since it was imported.
    """
    function = imported(path)
    note_imports(path)
    check_function(function)
    return OwnFunction(path)
