"""`FLModel`, the value that a client script receives and sends, and `ParamsType`.

Names and argument order are those of `nvflare.client`, so a script written for NVFlare works after
its import line is changed. This module imports only the standard library.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeGuard

NUM_STEPS = "NUM_STEPS_CURRENT_ROUND"
"""Key of `FLModel.meta` for a script's number of local steps, the weight of its update."""

NUM_EVAL_EXAMPLES = "NUM_EVAL_EXAMPLES"
"""Key of `FLModel.meta` for the metrics' weight, a number of examples. Default: the update's."""

LOCAL_STEPS = "LOCAL_STEPS"
"""Key of `FLModel.meta` for how far the local steps went, for FedNova; see `LocalSteps`."""

ALGORITHM = "algorithm"
"""Key of `get_config()` for the algorithm of the local steps, if a recipe needs one: see below."""

SCAFFOLD = "scaffold"
FEDNOVA = "fednova"

FEDPROX_MU = "fedprox_mu"
"""Key of `get_config()` for the weight of FedProx's term."""

CONTROL = "control"
"""Group of `FLModel.extras` with SCAFFOLD's control variates."""

SCAFFOLD_CONTROLS = "scaffold_c_global"
SCAFFOLD_DIFFERENCE = "scaffold_c_diff"
"""Keys of `FLModel.meta` for the control variates and their changes in NVFlare's scripts."""

SUBMIT_MODEL_NAME = "submit_model_name"
"""Key of a received `FLModel.meta` for the name of the model that the site should submit."""

VALIDATE_TYPE = "validate_type"
"""Key of a received `FLModel.meta` for the purpose of a validation."""


def is_count(value: Any) -> TypeGuard[float]:
    """Whether a value can be a weight: a finite number from 0, no integer too large for a float."""
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value <= sys.float_info.max


class ParamsType(StrEnum):
    """Content of `FLModel.params`: the parameters, or their difference to the received model."""

    FULL = "FULL"
    DIFF = "DIFF"


@dataclass
class FLModel:
    """A model, or the metrics of one, on its way between the coordinator and a client script.

    Attributes:
        params_type: `FULL` or `DIFF`; `FULL` if params are given without it.
        params: parameter name -> torch tensor or numpy array, of any shape.
        optimizer_params: kept for compatibility; never leaves the site.
        metrics: metric name -> number. If sent with params, they score the *received* global model.
        start_round, current_round, total_rounds: rounds are numbered from 0.
        meta: any values; `meta["NUM_STEPS_CURRENT_ROUND"]` is the weight of the update.
        extras: group -> parameter name -> tensor or array: what an algorithm exchanges in addition
            to the parameters.

    Raises:
        ValueError: `params_type` without `params`, an unknown `params_type`, or a negative round.
        TypeError: `metrics` or `meta` isn't a dict.
    """

    params_type: ParamsType | str | None = None
    params: Mapping[str, Any] | None = None
    optimizer_params: Any = None
    metrics: dict[str, Any] | None = None
    start_round: int | None = 0
    current_round: int | None = None
    total_rounds: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.params_type is not None:
            self.params_type = ParamsType(self.params_type)
            if self.params is None:
                raise ValueError(
                    f"params_type={self.params_type.value} describes params, but params is None: give both, or neither"
                )
        elif self.params is not None:
            self.params_type = ParamsType.FULL
        self.meta = self.meta or {}  # scripts may pass None
        for name in ("metrics", "meta"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise TypeError(f"{name} must be a dict, got {type(value).__name__}: {value!r}")
        for name in ("start_round", "current_round", "total_rounds"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} must be a whole number from 0, got {value!r}")

    def summary(self) -> dict[str, Any]:
        """The model without its tensors: counts for params, values for the rest."""
        shown = {
            "params_type": self.params_type,
            "params": None if self.params is None else len(self.params),
            "metrics": self.metrics,
            "current_round": self.current_round,
            "total_rounds": self.total_rounds,
            "meta": self.meta,
            "extras": {group: len(values) for group, values in self.extras.items()},
        }
        return {name: value for name, value in shown.items() if value not in (None, {})}

    def __repr__(self) -> str:
        return f"FLModel({', '.join(f'{name}={value!r}' for name, value in self.summary().items())})"
