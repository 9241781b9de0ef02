"""`FLModel.meta`: what a received one holds, by the keys that NVFlare's scripts read, and what may
be sent in one.

SCAFFOLD's control variates lie in `FLModel.extras`. A script that was written for NVFlare finds
them in `meta`, too, and may send their changes there.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fedpool.arrays import describe, is_torch
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
"""The values are NVFlare's: it asks a site for no other model, and for no other kind of
validation.
"""


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
        rounds: current and total, as the model says them.
        params: of the model.
        extras: of the model. Where it has no control variates yet, or the round does not train,
            those in `meta` are zeros.
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
    """`meta` of a model that is sent, as JSON holds it: numbers, strings, booleans and None.

    Args:
        received: `meta` of the received model: a script may send it back.

    Raises:
        ClientError: a value is something else, or the number of examples is not one.
    """
    plain: dict[str, Any] = {}
    for key, value in meta.items():
        if key == SCAFFOLD_DIFFERENCE or (isinstance(value, Mapping) and received.get(key) is value):
            continue
        if hasattr(value, "item"):  # a numpy or torch scalar; of an array item() raises
            with suppress(ValueError, RuntimeError):
                value = value.item()
        if not isinstance(value, str | int | float | bool | None):
            raise ClientError(
                f"meta[{key!r}] must be a number or a string, got {type(value).__name__}: send arrays as params"
            )
        if key == NUM_EVAL_EXAMPLES and not is_count(value):
            raise ClientError(
                f"meta[{key!r}] must be a finite number from 0, the examples that the metrics are of, got {value!r}"
            )
        plain[str(key)] = value if not isinstance(value, float) or math.isfinite(value) else str(value)
    return plain


def sent_control(
    meta: Mapping[str, Any], params: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What SCAFFOLD's variate of a site has changed by, where a script gives it in `meta` as
    NVFlare's scripts do.

    Args:
        params: that are sent; of those that are trained and that `meta` lacks, the variate has not
            changed.
        config: of the site.

    Raises:
        ClientError: the recipe exchanges no variates, or the script sends some of a parameter that
            the model lacks.
    """
    if SCAFFOLD_DIFFERENCE not in meta:
        return None
    changes = meta[SCAFFOLD_DIFFERENCE]
    if config.get(ALGORITHM) != SCAFFOLD:
        raise ClientError(
            f"meta[{SCAFFOLD_DIFFERENCE!r}] is of SCAFFOLD, and this job's recipe is not: use ScaffoldRecipe"
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
