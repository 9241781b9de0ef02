"""The model that a script receives in a round, made from the host's assignment and from files."""

from typing import Any

from fedpool.arrays import ParamsFormat, load_arrays
from fedpool.client import keeping
from fedpool.client.hosts import Assignment, Host
from fedpool.client.meta import received_meta
from fedpool.model import FLModel, ParamsType
from fedpool.tensors import split_beside


def received_model(host: Host, assignment: Assignment, params_format: ParamsFormat) -> FLModel:
    """The global model of a round, with its extras and the parameters that stay at the site."""
    params = host.params(assignment, params_format)
    if assignment.exclude:
        params.update(keeping.kept(assignment, keeping.EXCLUDED, params_format) or {})
    extras = _extras(assignment, params_format)
    # Scripts size schedules by the number of rounds, so rounds after the training have the number
    # of its last one.
    total_rounds = max(1, assignment.total_rounds)
    current_round = min(assignment.round, total_rounds - 1)
    return FLModel(
        params_type=ParamsType.FULL,
        params=params,
        start_round=0,
        current_round=current_round,
        total_rounds=total_rounds,
        meta=received_meta(
            assignment, host.welcome, rounds=(current_round, total_rounds), params=params, extras=extras
        ),
        extras=extras,
    )


def _extras(assignment: Assignment, params_format: ParamsFormat) -> dict[str, dict[str, Any]]:
    """The tensors sent along with the global model: group -> name -> array."""
    extras: dict[str, dict[str, Any]] = {}
    if assignment.extras is not None:
        for name, value in load_arrays(assignment.extras, params_format).items():
            group, parameter = split_beside(name)
            extras.setdefault(group, {})[parameter] = value
    return extras
