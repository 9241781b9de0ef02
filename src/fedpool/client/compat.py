"""The names that client scripts take from NVFlare's deeper modules; `fedpool migrate` points their
imports here.

Names and values are NVFlare's, because scripts use them as keys and compare with them. What fedpool
gives these keys is told by docs/from-nvflare.md. This module imports nothing but the standard
library.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from enum import Enum, StrEnum
from typing import Any, overload

from fedpool.errors import ClientError
from fedpool.model import (
    FEDPROX_MU,
    NUM_STEPS,
    SCAFFOLD_CONTROLS,
    SCAFFOLD_DIFFERENCE,
    SUBMIT_MODEL_NAME,
    VALIDATE_TYPE,
    FLModel,
    ParamsType,
)

__all__ = [
    "AlgorithmConstants",
    "AnalyticsDataType",
    "ConfigKey",
    "ExchangeFormat",
    "FLMetaKey",
    "FLModel",
    "FLModelConst",
    "LogWriterName",
    "MetaKey",
    "ModelName",
    "NPConstants",
    "ParamsType",
    "TransferType",
    "ValidateType",
    "evaluate",
    "get_fedprox_mu",
    "train",
]


class FLMetaKey:
    """Keys of `FLModel.meta`. Of those that a script sends `NUM_STEPS_CURRENT_ROUND` has a
    meaning here.
    """

    NUM_STEPS_CURRENT_ROUND = NUM_STEPS
    PROCESSED_ALGORITHM = "PROCESSED_ALGORITHM"
    PROCESSED_KEYS = "PROCESSED_KEYS"
    INITIAL_METRICS = "initial_metrics"
    FILTER_HISTORY = "filter_history"
    CONFIGS = "configs"
    VALIDATE_TYPE = VALIDATE_TYPE
    START_ROUND = "start_round"
    CURRENT_ROUND = "current_round"
    TOTAL_ROUNDS = "total_rounds"
    JOB_ID = "job_id"
    SITE_NAME = "site_name"
    SUBMIT_MODEL_NAME = SUBMIT_MODEL_NAME


MetaKey = FLMetaKey


class FLModelConst:
    """The names of `FLModel`'s fields."""

    PARAMS_TYPE = "params_type"
    PARAMS = "params"
    OPTIMIZER_PARAMS = "optimizer_params"
    METRICS = "metrics"
    CURRENT_ROUND = "current_round"
    START_ROUND = "start_round"
    TOTAL_ROUNDS = "total_rounds"
    META = "meta"


class ModelName:
    """What `meta["submit_model_name"]` asks for in a `submit_model` round."""

    BEST_MODEL = "best_model"
    FINAL_MODEL = "final_model"


class ValidateType:
    """Values of `meta["validate_type"]`."""

    BEFORE_TRAIN_VALIDATE = "before_train_validate"
    MODEL_VALIDATE = "model_validate"


class AlgorithmConstants:
    """Keys by which an algorithm and a script find each other."""

    FEDPROX_MU = FEDPROX_MU
    SCAFFOLD_CTRL_DIFF = SCAFFOLD_DIFFERENCE
    SCAFFOLD_CTRL_GLOBAL = SCAFFOLD_CONTROLS


class NPConstants:
    """The name of the one array that NVFlare's NumPy recipes exchange: give the recipe
    `model={"numpy_key": array}`.
    """

    NUMPY_KEY = "numpy_key"


class ExchangeFormat(StrEnum):
    """How params arrive; here `flare.init(params_format=...)` says so, or what the script has
    imported.
    """

    RAW = "raw"
    PYTORCH = "pytorch"
    NUMPY = "numpy"
    KERAS_LAYER_WEIGHTS = "keras_layer_weights"


class TransferType(StrEnum):
    """What an update holds; here the recipe's `params_transfer_type`."""

    FULL = "FULL"
    DIFF = "DIFF"


class ConfigKey:
    """Keys of NVFlare's client configuration; fedpool sets none of them, so
    `get_config().get(...)` gives its default.
    """

    EXCHANGE_FORMAT = "exchange_format"
    SERVER_EXPECTED_FORMAT = "server_expected_format"
    TRANSFER_TYPE = "transfer_type"
    TRAIN_WITH_EVAL = "train_with_eval"
    TRAIN_TASK_NAME = "train_task_name"
    EVAL_TASK_NAME = "eval_task_name"
    SUBMIT_MODEL_TASK_NAME = "submit_model_task_name"
    TASK_NAME = "TASK_NAME"
    TASK_EXCHANGE = "TASK_EXCHANGE"
    MEMORY_GC_ROUNDS = "memory_gc_rounds"
    CUDA_EMPTY_CACHE = "cuda_empty_cache"
    LAUNCH_ONCE = "launch_once"


class AnalyticsDataType(Enum):
    """What `flare.log` is given: a number, several, or a text."""

    SCALARS = "SCALARS"
    SCALAR = "SCALAR"
    IMAGE = "IMAGE"
    TEXT = "TEXT"
    LOG_RECORD = "LOG_RECORD"
    PARAMETER = "PARAMETER"
    PARAMETERS = "PARAMETERS"
    METRIC = "METRIC"
    METRICS = "METRICS"
    MODEL = "MODEL"
    TAG = "TAG"
    TAGS = "TAGS"
    INIT_DATA = "INIT_DATA"


class LogWriterName(Enum):
    """Whose interface a writer has; all of them write to the same place."""

    TORCH_TB = "TORCH_TENSORBOARD"
    MLFLOW = "MLFLOW"
    WANDB = "WEIGHTS_AND_BIASES"


_TEXTS = (AnalyticsDataType.TEXT, AnalyticsDataType.PARAMETER, AnalyticsDataType.TAG)
_MANY_TEXTS = (AnalyticsDataType.PARAMETERS, AnalyticsDataType.TAGS)
_MANY_NUMBERS = (AnalyticsDataType.SCALARS, AnalyticsDataType.METRICS)
_REFUSED = (
    AnalyticsDataType.IMAGE,
    AnalyticsDataType.LOG_RECORD,
    AnalyticsDataType.MODEL,
    AnalyticsDataType.INIT_DATA,
)


def entries(key: str, value: Any, data_type: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `log(key, value, data_type)` says: numbers by their names, and texts by theirs.

    SCALARS are named `key/name`, as TensorBoard shows them; METRICS, PARAMETERS and TAGS by their
    own names, as MLflow does.

    Raises:
        ClientError: a data type that cannot be logged here, or several values that are not a dict.
    """
    if data_type is None:
        return {key: value}, {}
    if data_type in _REFUSED:
        raise ClientError(f"log({key!r}) of {data_type.value} is not possible here: log numbers or text")
    if data_type in (*_MANY_TEXTS, *_MANY_NUMBERS):
        if not isinstance(value, Mapping):
            raise ClientError(f"log({key!r}) of {data_type.value} takes a dict, got {type(value).__name__}: {value!r}")
        values = {str(name): each for name, each in value.items()}
        if data_type is AnalyticsDataType.SCALARS:
            values = {f"{key}/{name}": each for name, each in values.items()}
        return (values, {}) if data_type in _MANY_NUMBERS else ({}, values)
    return ({}, {key: value}) if data_type in _TEXTS else ({key: value}, {})


def get_fedprox_mu(model: FLModel) -> float:
    """The weight of FedProx's term, as the recipe gives it: of `model.meta`, or of the site's
    config.

    Raises:
        ClientError: neither has one, or it is not a positive number.
    """
    import fedpool.client

    mu = (model.meta or {}).get(FEDPROX_MU, fedpool.client.get_config().get(FEDPROX_MU))
    if isinstance(mu, bool) or not isinstance(mu, int | float) or not math.isfinite(mu) or mu <= 0:
        raise ClientError(
            f"{FEDPROX_MU} must be a positive number, got {mu!r}: use a FedProxRecipe with fedprox_mu above 0"
        )
    return float(mu)


_scores: dict[str, Any] = {}
"""What `evaluate` has found in this round, for `train` to send; a process is one client."""


@overload
def train(function: Callable[..., Any]) -> Callable[..., Any]: ...
@overload
def train(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
def train(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Decorate a training function: it is called with the received model and returns the `FLModel`
    that is sent.

    What a function decorated with `evaluate` has returned in this round is sent as its metrics. New
    scripts do better with `receive()` and `send()`.
    """

    def decorate(train_function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train_function)
        def round_of(*args: Any, **kwargs: Any) -> Any:
            import fedpool.client

            result = _call_with_model(train_function, args, kwargs)
            if not isinstance(result, FLModel):
                raise ClientError(
                    f"{train_function.__name__}() must return a flare.FLModel, got {type(result).__name__}: "
                    "return flare.FLModel(params=...)"
                )
            if _scores:
                result.metrics = dict(_scores)
                _scores.clear()
            fedpool.client.send(result)
            return result

        return round_of

    return decorate if function is None else decorate(function)


@overload
def evaluate(function: Callable[..., Any]) -> Callable[..., Any]: ...
@overload
def evaluate(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
def evaluate(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Decorate an evaluation function: it is called with the received model and returns its
    metrics, a dict, or one number.

    In a `train` round call it before the function that `train` decorates, which sends them. In
    other rounds they are sent at once.
    """

    def decorate(evaluate_function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(evaluate_function)
        def round_of(*args: Any, **kwargs: Any) -> Any:
            import fedpool.client

            result = _call_with_model(evaluate_function, args, kwargs)
            if result is None:
                raise ClientError(f"{evaluate_function.__name__}() must return the model's metrics, got None")
            metrics = dict(result) if isinstance(result, Mapping) else {evaluate_function.__name__: result}
            if fedpool.client.is_train():
                _scores.update(metrics)
            else:
                fedpool.client.send(FLModel(metrics=metrics))
            return result

        return round_of

    return decorate if function is None else decorate(function)


def _call_with_model(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function with the received model in place of its first argument, whatever the
    script gave for it.
    """
    import fedpool.client

    first = next(iter(inspect.signature(function).parameters), None)
    if first is None:
        raise ClientError(f"{function.__name__}() needs a first parameter, for the received model")
    others = {name: value for name, value in kwargs.items() if name != first}
    return function(fedpool.client.receive(), *args[1:], **others)
