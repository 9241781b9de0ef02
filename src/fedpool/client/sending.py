"""The update that a script sends in a round: a message to its host, and a file of tensors."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedpool.arrays import save_arrays
from fedpool.bounds import as_float, too_many
from fedpool.client import keeping
from fedpool.client.hosts import Assignment
from fedpool.client.meta import sent_control, sent_meta
from fedpool.errors import ClientError
from fedpool.model import CONTROL, FLModel, ParamsType
from fedpool.refusals import explained
from fedpool.tensors import beside


def update_message(assignment: Assignment, model: FLModel, received: FLModel) -> dict[str, Any]:
    """The message about an update without params; for others, merge the result of `write_params`.

    Raises:
        ClientError: the model is empty, or its metrics or meta can't be sent.
    """
    for what, values in (("metrics", model.metrics or {}), ("meta", model.meta)):
        if wrong := too_many({str(name): value for name, value in values.items()}):
            raise ClientError(
                f"{what} cannot be sent: {wrong}. Send the values that the round needs; log others with flare.log"
            )
    if model.params is None and model.metrics is None:
        raise ClientError("the model has neither params nor metrics: give flare.FLModel(params=..., metrics=...)")
    return {
        "round": assignment.round,
        "metrics": {name: number(f"metrics[{name!r}]", value) for name, value in (model.metrics or {}).items()},
        "meta": sent_meta(model.meta, received.meta),
        "params_type": None,
        "num_params": 0,
    }


def write_params(assignment: Assignment, model: FLModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write the update's file and keep the excluded parameters; returns the host's further fields.

    Args:
        assignment: the script's work in the round.
        model: the script's model, with params.
        config: the site's config.

    Raises:
        ClientError: params or extras aren't dicts of arrays, or aren't what the recipe exchanges.
    """
    assert model.params is not None
    params = model.params
    if not isinstance(params, Mapping):
        raise ClientError(
            f"params must be a dict of name -> array, got {type(params).__name__}: send model.state_dict()"
        )
    params_type = ParamsType(model.params_type or ParamsType.FULL)
    excluded = {name for name in params if any(re.search(pattern, name) for pattern in assignment.exclude)}
    sent = {name: value for name, value in params.items() if name not in excluded}
    try:
        control = sent_control(model.meta, params, config) if assignment.task == "train" else None
        extras = model.extras if control is None else {**model.extras, CONTROL: control}
        beside_them = _beside(extras, excluded)
        # Without a host there is no file to write, but the params are still checked and counted.
        with explained(assignment.update or "update"), Path(assignment.update or "/dev/null").open("wb") as file:
            save_arrays(file, sent | beside_them)
        # Training can't continue from the DIFF of a parameter, only from its FULL value.
        if excluded and model.params_type is not ParamsType.DIFF:
            keeping.keep(assignment, keeping.EXCLUDED, {name: params[name] for name in excluded})
    except TypeError as error:
        raise ClientError(str(error)) from None
    return {"params_type": params_type.value, "num_params": len(sent)}


def number(what: str, value: Any) -> float:
    """A scalar as a Python float: a number, numpy scalar, 0-d or one-element array. Infinite if it
    is too large for one.

    Args:
        what: its name in the message.
        value: the scalar.

    Raises:
        ClientError: it isn't one number.
    """
    try:
        return as_float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError):
        raise ClientError(f"{what} must be one number, got {type(value).__name__}: {value!r}") from None


def _beside(extras: Mapping[str, Mapping[str, Any]], excluded: Collection[str]) -> dict[str, Any]:
    """The tensors in the update's file in addition to the params."""
    if not all(isinstance(values, Mapping) for values in extras.values()):
        raise ClientError("extras must be a dict of group -> dict of name -> array, such as Scaffold.extras() gives")
    return {
        beside(group, name): value
        for group, values in extras.items()
        for name, value in values.items()
        if name not in excluded
    }
