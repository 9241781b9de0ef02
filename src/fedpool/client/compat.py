"""Names that scripts import from NVFlare's deeper modules; `fedpool migrate` redirects them here.

Names and values are NVFlare's, because scripts use them as keys and compare with them.
docs/from-nvflare.md lists fedpool's values for these keys. This module imports only the standard
library and fedpool.
"""

import math
from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import Any

from fedpool.client.decorators import evaluate, train
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
    """Keys of `FLModel.meta`. In a sent model, only `NUM_STEPS_CURRENT_ROUND` has an effect."""

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
    """Values of `meta["submit_model_name"]` in a `submit_model` round."""

    BEST_MODEL = "best_model"
    FINAL_MODEL = "final_model"


class ValidateType:
    """Values of `meta["validate_type"]`."""

    BEFORE_TRAIN_VALIDATE = "before_train_validate"
    MODEL_VALIDATE = "model_validate"


class AlgorithmConstants:
    """Keys that algorithms and scripts share."""

    FEDPROX_MU = FEDPROX_MU
    SCAFFOLD_CTRL_DIFF = SCAFFOLD_DIFFERENCE
    SCAFFOLD_CTRL_GLOBAL = SCAFFOLD_CONTROLS


class NPConstants:
    """The one array of NVFlare's NumPy recipes: give the recipe `model={"numpy_key": array}`."""

    NUMPY_KEY = "numpy_key"


class ExchangeFormat(StrEnum):
    """The type of params. In fedpool, `flare.init(params_format=...)` or the script's imports
    decide.
    """

    RAW = "raw"
    PYTORCH = "pytorch"
    NUMPY = "numpy"
    KERAS_LAYER_WEIGHTS = "keras_layer_weights"


class TransferType(StrEnum):
    """The content of an update. In fedpool, the recipe's `params_transfer_type` decides."""

    FULL = "FULL"
    DIFF = "DIFF"


class ConfigKey:
    """Keys of NVFlare's client configuration. fedpool sets none, so `get()` gives its default."""

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
    """The kind of value for `flare.log`: a number, several, or a text."""

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
    """The library whose interface a writer has. All writers write to the same place."""

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
    """The entries of `log(key, value, data_type)`: numbers by name, and texts by name.

    SCALARS are named `key/name`, as in TensorBoard; METRICS, PARAMETERS and TAGS have their own
    names, as in MLflow.

    Raises:
        ClientError: the data type can't be logged, or several values aren't a dict.
    """
    if data_type is None:
        return {key: value}, {}
    if data_type in _REFUSED:
        raise ClientError(f"log({key!r}) of {data_type.value} is not possible: log numbers or text")
    if data_type in (*_MANY_TEXTS, *_MANY_NUMBERS):
        if not isinstance(value, Mapping):
            raise ClientError(f"log({key!r}) of {data_type.value} takes a dict, got {type(value).__name__}: {value!r}")
        values = {str(name): each for name, each in value.items()}
        if data_type is AnalyticsDataType.SCALARS:
            values = {f"{key}/{name}": each for name, each in values.items()}
        return (values, {}) if data_type in _MANY_NUMBERS else ({}, values)
    return ({}, {key: value}) if data_type in _TEXTS else ({key: value}, {})


def get_fedprox_mu(model: FLModel) -> float:
    """The weight of FedProx's term from the recipe, in `model.meta` or the config.

    Raises:
        ClientError: neither has one, or it isn't a positive number.
    """
    import fedpool.client

    mu = (model.meta or {}).get(FEDPROX_MU, fedpool.client.get_config().get(FEDPROX_MU))
    if isinstance(mu, bool) or not isinstance(mu, int | float) or not math.isfinite(mu) or mu <= 0:
        raise ClientError(
            f"{FEDPROX_MU} must be a positive number, got {mu!r}: use a FedProxRecipe with fedprox_mu above 0"
        )
    return float(mu)
