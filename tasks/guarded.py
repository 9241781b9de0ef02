"""Runs the code of a strategy. Its failures and wrong results become errors that name the class.

A strategy may be the user's own, and then nobody else has checked it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fedpool.errors import FedpoolError, RecipeError, RoundError
from fedpool.own_failures import OWN_FAILURES, told
from fedpool.recipe import Recipe
from fedpool.tasks.blocks import Block
from fedpool.tasks.geometry import Geometry
from fedpool.tasks.strategy import State, Strategy, Update
from fedpool.tensors import is_trained


def strategy_of(recipe: Recipe, num_sites: int) -> Strategy:
    """The strategy of a recipe.

    Args:
        num_sites: see `Recipe.strategy`.

    Raises:
        RecipeError: the recipe's method fails, or returns something else.
    """
    name = f"{type(recipe).__qualname__}.strategy"
    try:
        made = recipe.strategy(num_sites)
        wrong = _wrong_attribute(made)
    except FedpoolError:
        raise
    except OWN_FAILURES as error:
        raise RecipeError(f"{name}({num_sites}) failed: {told(error)}") from error
    if not isinstance(made, Strategy):
        raise RecipeError(f"{name} returned {_kind(made)}: return an instance of a subclass of Strategy")
    if wrong:
        raise RecipeError(f"{type(made).__qualname__}.{wrong}")
    return made


def _wrong_attribute(strategy: Any) -> str | None:
    """The attribute of a strategy that has a wrong type, with the remedy; None: all are right."""
    if not isinstance(strategy, Strategy):
        return None
    for what in ("extras", "positive_meta"):
        names = getattr(strategy, what)
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) and "::" not in name for name in names):
            return f"{what} is {names!r}: give a tuple of names without '::', such as ('control',)"
    slots = strategy.slots
    named = isinstance(slots, Mapping) and all(isinstance(slot, str) and "::" not in slot for slot in slots)
    if not named or not all(isinstance(value, int | float) and math.isfinite(value) for value in slots.values()):
        return f"slots is {slots!r}: give the initial value of each, such as {{'momentum': 0.0}}; names have no '::'"
    return None


@contextmanager
def running(what: object, method: str, name: str | None = None) -> Iterator[None]:
    """Run a method of a strategy.

    Args:
        what: the strategy.
        name: of the parameter that it handles.

    Raises:
        RoundError: it fails.
    """
    try:
        yield
    except FedpoolError:  # also of the slices that it reads
        raise
    except OWN_FAILURES as error:
        at = "" if name is None else f" at parameter {name}"
        raise RoundError(f"{type(what).__qualname__}.{method} failed{at}: {told(error)}") from error


def check_chosen(strategy: Strategy, chosen: Any, sites: Sequence[str]) -> None:
    """Refuse a choice of sites that isn't one of these.

    Raises:
        RoundError: it isn't.
    """
    known = (
        isinstance(chosen, Sequence) and not isinstance(chosen, str) and all(isinstance(site, str) for site in chosen)
    )
    if not known or not set(chosen) <= set(sites) or len(set(chosen)) != len(chosen):
        raise RoundError(
            f"{type(strategy).__qualname__}.choose returned {str(chosen)[:200]}: return some of the sites that it got, each once"
        )


def surveyed(strategy: Strategy, geometry: Geometry) -> Strategy:
    """The strategy for one round, from its `survey`.

    Raises:
        RoundError: it fails, or returns something else.
    """
    with running(strategy, "survey"):
        made = strategy.survey(geometry)
    if not isinstance(made, Strategy):
        raise RoundError(f"{type(strategy).__qualname__}.survey returned {_kind(made)}: return a strategy")
    return made


def begun(strategy: Strategy, params: Mapping[str, torch.Tensor], averaged: frozenset[str], block: Block) -> State:
    """A block of the state that a strategy's `init` makes.

    Raises:
        RoundError: it fails, or returns something else.
    """
    with running(strategy, "init", block.name):
        state = strategy.init(params, averaged)
    return _state(strategy, "init", state, block)


def applied(strategy: Strategy, state: State, updates: Sequence[Update], block: Block) -> tuple[State, torch.Tensor]:
    """A block of the state after a strategy's `apply`, and of the next global model.

    Raises:
        RoundError: it fails, or returns something that can't be the next state.
    """
    with running(strategy, "apply", block.name):
        made = strategy.apply(state, updates)
    made = _state(strategy, "apply", made, block)
    if not strategy.slots and made.slots:
        raise _wrong(
            strategy,
            "apply",
            block,
            f"returned the slots {_names(made.slots)}, but the class has none: name them in slots",
        )
    return made, _values(strategy, made.params, "params", block)


def slots_of(strategy: Strategy, state: State, block: Block) -> Iterator[tuple[str, torch.Tensor]]:
    """A block of each slot of a state.

    Raises:
        RoundError: the state lacks a slot, has another, or a slot has another size.
    """
    if not is_trained(block.name, block.spec):
        return
    if state.slots.keys() != strategy.slots.keys():
        raise _wrong(
            strategy,
            "apply",
            block,
            f"returned the slots {_names(state.slots)}: the class has {_names(strategy.slots)}",
        )
    for slot in strategy.slots:
        yield slot, _values(strategy, state.slots[slot], f"slots[{slot!r}]", block)


def _state(strategy: Strategy, method: str, made: Any, block: Block) -> State:
    if not isinstance(made, State) or not isinstance(made.slots, Mapping):
        raise _wrong(
            strategy,
            method,
            block,
            f"returned {_kind(made)}: return a State, such as state.after({{{block.name!r}: value}})",
        )
    return made


def _values(strategy: Strategy, values: Any, what: str, block: Block) -> torch.Tensor:
    """A block of what a strategy returned, on this machine's processor."""
    name, size = block.name, block.stop - block.start
    if not isinstance(values, Mapping) or name not in values:
        found = _names(values) if isinstance(values, Mapping) else _kind(values)
        raise _wrong(
            strategy,
            "apply",
            block,
            f"returned {what} {found}: it must map the names that state.params has to their values",
        )
    with running(strategy, "apply", name):  # the values may be computed now
        value = values[name]
    if not isinstance(value, torch.Tensor) or value.is_complex() or value.layout is not torch.strided:
        raise _wrong(strategy, "apply", block, f"returned {_kind(value)} in {what}: return a float64 tensor")
    if value.shape != (size,):
        raise _wrong(
            strategy,
            "apply",
            block,
            f"returned a tensor of shape {list(value.shape)} in {what}, but it has to be [{size}]: return a flat tensor that is "
            f"as long as state.params[{name!r}]",
        )
    value = value.detach().to("cpu")
    # fedpool's own strategies fail at values that are too large, and only the result says so.
    if not type(strategy).__module__.startswith("fedpool.") and not bool(value.isfinite().all()):
        raise _wrong(
            strategy,
            "apply",
            block,
            f"returned NaN or infinity in {what}, although every update is finite: look for divisions by 0 and values that are "
            "too large",
        )
    return value


def _wrong(strategy: Strategy, method: str, block: Block, how: str) -> RoundError:
    return RoundError(f"{type(strategy).__qualname__}.{method} at parameter {block.name}: it {how}")


def _kind(value: object) -> str:
    if value is None:
        return "None"
    return f"the class {value.__qualname__}" if isinstance(value, type) else f"a {type(value).__name__}"


def _names(values: Mapping[Any, Any]) -> str:
    shown = ", ".join(str(name)[:80] for name in list(values)[:5])
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return f"[{shown}{more}]"
