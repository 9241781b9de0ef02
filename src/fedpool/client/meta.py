"""`FLModel.meta`: the entries of a received one, under NVFlare's keys, and those that may be sent.

SCAFFOLD's control variates are in `FLModel.extras`. For scripts written for NVFlare they are also
in `meta`, where such a script may send their changes.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fedpool.arrays import describe, is_torch
from fedpool.bounds import as_float
from fedpool.client.hosts import Assignment, Welcome
from fedpool.errors import ClientError
from fedpool.model import (
    ALGORITHM,
    CONTROL,
    FEDPROX_MU,
    NUM_EVAL_EXAMPLES,
    SCAFFOLD,
    SCAFFOLD_CONTROLS,
    SCAFFOLD_DIFFERENCE,
    SUBMIT_MODEL_NAME,
    VALIDATE_TYPE,
    is_count,
)
from fedpool.tensors import is_trained

_OF_TASK: Mapping[str, Mapping[str, str]] = {
    "submit_model": {SUBMIT_MODEL_NAME: "best_model"},
    "evaluate": {VALIDATE_TYPE: "model_validate"},
}
"""The values are NVFlare's. fedpool asks a site for no other model, and no other validation."""


def received_meta(
    assignment: Assignment,
    welcome: Welcome,
    *,
    rounds: tuple[int, int],
    params: Mapping[str, Any],
    extras: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """`meta` of a received model.

    Args:
        rounds: the model's current and total rounds.
        params: the model's params.
        extras: the model's extras. If they have no control variates yet, or the round doesn't
            train, those in `meta` are zeros.
    """
    current, total = rounds
    meta: dict[str, Any] = {
        "job_id": welcome.job_id,
        "site_name": welcome.site,
        "start_round": 0,
        "current_round": current,
        "total_rounds": total,
        **_OF_TASK.get(assignment.task, {}),
    }
    if FEDPROX_MU in welcome.config:
        meta[FEDPROX_MU] = welcome.config[FEDPROX_MU]
    if welcome.config.get(ALGORITHM) == SCAFFOLD:
        known = extras.get(CONTROL, {})
        meta[SCAFFOLD_CONTROLS] = {
            name: known[name] if name in known else _zeros(value) for name, value in params.items()
        }
    return meta


def sent_meta(meta: Mapping[str, Any], received: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` of a sent model, in JSON's types: numbers, strings, booleans and None.

    Args:
        meta: from the script.
        received: `meta` of the received model, because a script may send it back.

    Raises:
        ClientError: a value has another type, or the number of examples is invalid.
    """
    plain: dict[str, Any] = {}
    for key, value in meta.items():
        if key == SCAFFOLD_DIFFERENCE or (isinstance(value, Mapping) and received.get(key) is value):
            continue
        if hasattr(value, "item"):  # a numpy or torch scalar; item() of an array raises
            with suppress(ValueError, RuntimeError):
                value = value.item()
        if not isinstance(value, str | int | float | bool | None):
            raise ClientError(
                f"meta[{key!r}] must be a number or a string, got {type(value).__name__}: send arrays as params"
            )
        if key == NUM_EVAL_EXAMPLES and not is_count(value):
            raise ClientError(
                f"meta[{key!r}] must be a finite number from 0, the number of examples behind the metrics, got {value!r}"
            )
        # JSON has neither infinity nor NaN, and few readers know integers of hundreds of digits.
        if isinstance(value, int | float) and not math.isfinite(number := as_float(value)):
            value = str(number)
        plain[str(key)] = value
    return plain


def sent_control(
    meta: Mapping[str, Any], params: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The change of a site's SCAFFOLD variate, if a script gives it in `meta` as NVFlare's scripts
    do.

    Args:
        meta: from the script.
        params: the sent params. The variate of a trained one that `meta` lacks hasn't changed.
        config: the site's config.

    Raises:
        ClientError: the recipe exchanges no variates, or `meta` has one for a parameter that isn't
            sent.
    """
    if SCAFFOLD_DIFFERENCE not in meta:
        return None
    changes = meta[SCAFFOLD_DIFFERENCE]
    if config.get(ALGORITHM) != SCAFFOLD:
        raise ClientError(
            f"meta[{SCAFFOLD_DIFFERENCE!r}] is for SCAFFOLD, but this job has another recipe: use ScaffoldRecipe"
        )
    if not isinstance(changes, Mapping):
        raise ClientError(
            f"meta[{SCAFFOLD_DIFFERENCE!r}] must be a dict of name -> array, got {type(changes).__name__}"
        )
    if unknown := sorted(set(changes) - set(params)):
        raise ClientError(
            f"meta[{SCAFFOLD_DIFFERENCE!r}] names {unknown[0]!r}, which is not among the params: {', '.join(sorted(params)[:8])}"
        )
    return {
        name: changes[name] if name in changes else _zeros(value)
        for name, value in params.items()
        if is_trained(name, describe(name, value))
    }


def _zeros(value: Any) -> Any:
    if is_torch(value):
        import torch

        return torch.zeros_like(value)
    import numpy

    return numpy.zeros_like(value)
