"""The client API: six lines turn a local training script into a federated client.

::

    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        input_model = flare.receive()
        model.load_state_dict(input_model.params)
        ...                                            # your own training loop
        metrics = {"accuracy": score_of_received_model}
        meta = {"NUM_STEPS_CURRENT_ROUND": steps}
        flare.send(flare.FLModel(params=model.state_dict(), metrics=metrics, meta=meta))

The names of functions, `FLModel` and `ParamsType` are those of `nvflare.client`. This module
imports neither Prefect nor torch. Without a host, a script runs one round on its own initial
weights.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from fedpool.arrays import ParamsFormat
from fedpool.client.api import Client as _Client
from fedpool.client.api import start as _start
from fedpool.client.compat import AnalyticsDataType
from fedpool.client.compat import entries as _entries
from fedpool.client.decorators import evaluate, train
from fedpool.client.local import prox_loss
from fedpool.client.scaffold import Scaffold
from fedpool.client.steps import LocalSteps
from fedpool.errors import ClientError
from fedpool.model import FLModel, ParamsType

__all__ = [
    "AnalyticsDataType",
    "FLModel",
    "LocalSteps",
    "ParamsType",
    "Scaffold",
    "evaluate",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "keep",
    "kept",
    "log",
    "prox_loss",
    "receive",
    "send",
    "shutdown",
    "system_info",
    "train",
]

_client: _Client | None = None  # a process is one client; the functions below are its methods


def _current(ctx: _Client | None = None) -> _Client:
    if ctx is not None:
        if not isinstance(ctx, _Client):
            raise ClientError(
                f"ctx must be the value that flare.init() returned, got {type(ctx).__name__}: leave it out"
            )
        return ctx
    if _client is None:
        raise ClientError("the client API is not initialised: call flare.init() first")
    return _client


def _ensure_started(rank: int | None = None) -> _Client:
    """The client; connects to the host if `init` wasn't called. For the trainer integrations."""
    global _client
    if _client is None:
        _client = _start(rank, "torch")
    return _client


def init(
    rank: int | str | None = None, config_file: Any = None, *, params_format: ParamsFormat | None = None
) -> _Client:
    """Connect this script to its host. Call it once, before any other function.

    Args:
        rank: the global rank of this process under torchrun; only rank 0 talks to the host. None
            reads `RANK`.
        config_file: accepted for compatibility, but not read: the recipe and the site configure the
            script. A value causes a warning.
        params_format: "torch" or "numpy", the type of the received params. None: torch if the
            script has imported it, else numpy.

    Returns: the `ctx` argument of the other functions. You can leave it out, because a process has
    one client.

    A second call warns and changes nothing.
    """
    global _client
    if _client is not None:
        warnings.warn("flare.init() was already called: this call changes nothing", stacklevel=2)
        return _client
    if config_file is not None:
        warnings.warn(
            f"flare.init() does not read config_file={str(config_file)!r}: the recipe and the site configure this script, "
            "see flare.get_config()",
            stacklevel=2,
        )
    _client = _start(None if rank is None else int(rank), params_format)
    return _client


def is_running(ctx: _Client | None = None) -> bool:
    """Block until there is an assignment (True) or the job is over (False).

    Raises:
        ClientError: the script went through a round without calling `send()`.
    """
    return _current(ctx).is_running()


def receive(timeout: float | None = None, ctx: _Client | None = None) -> FLModel | None:
    """The global model of the round. Further calls in the same round return the same model.

    Args:
        timeout: seconds to wait for an assignment; None waits until there is one or the job is
            over.

    Returns: a model with `params`, `current_round`, `total_rounds` and `meta`; None after `timeout`
    or when the job is over.
    """
    return _current(ctx).receive(timeout)


def send(model: FLModel, clear_cache: bool = True, ctx: _Client | None = None) -> None:
    """Send the round's update. Call it once per round, after `receive()`.

    Args:
        model: `params` (name -> torch tensor or numpy array), `metrics` (name -> number, the score
            of the *received* model), or both; `meta["NUM_STEPS_CURRENT_ROUND"]` is the update's
            weight (default: 1).
        clear_cache: accepted for compatibility; nothing is cached after a send.

    Raises:
        ClientError: the call is out of order, the model isn't an `FLModel` or has neither params
            nor metrics, or the params aren't a dict of arrays.
    """
    _current(ctx).send(model)


def keep(name: str, params: Mapping[str, Any]) -> None:
    """Keep tensors at this site for later rounds, even if this process ends. They never leave the
    site.

    A round that is repeated starts from the tensors that were kept before it, so keep everything
    that training continues from.

    Args:
        name: the name for `kept`: letters, digits, `.`, `_` and `-`.
        params: name -> torch tensor or numpy array.

    Raises:
        ClientError: outside a round.
    """
    _current().keep(name, params)


def kept(name: str, *, initial: bool = False) -> dict[str, Any] | None:
    """The tensors that this site kept under a name in an earlier round; None if there are none.

    Args:
        initial: if there are none, return the model that a site's own model starts from: the job's
            initial model if the recipe asks for it (`DittoRecipe(personal_start="initial")`), else
            the received model.

    Raises:
        ClientError: outside a round.
    """
    return _current().kept(name, initial=initial)


def is_train(ctx: _Client | None = None) -> bool:
    """Whether the assignment is to train the received model."""
    return _current(ctx).task_name == "train"


def is_evaluate(ctx: _Client | None = None) -> bool:
    """Whether the assignment is to score the received model and send only metrics."""
    return _current(ctx).task_name == "evaluate"


def is_submit_model(ctx: _Client | None = None) -> bool:
    """Whether the assignment is to send the site's own model."""
    return _current(ctx).task_name == "submit_model"


def get_job_id(ctx: _Client | None = None) -> str:
    """The id of the job that this script belongs to."""
    return _current(ctx).job_id


def get_site_name(ctx: _Client | None = None) -> str:
    """The name of the site where this script runs."""
    return _current(ctx).site_name


def get_task_name(ctx: _Client | None = None) -> str:
    """`train`, `evaluate` or `submit_model`."""
    return _current(ctx).task_name


def get_config(ctx: _Client | None = None) -> dict[str, Any]:
    """This script's configuration: the recipe's `config`, overridden by its `per_site_config`,
    overridden by the site's own.
    """
    return _current(ctx).config


def system_info(ctx: _Client | None = None) -> dict[str, str | int]:
    """`job_id`, `site_name`, `site_index` and `num_sites`. `site_index` counts from 0, in the
    natural order of site names.
    """
    return _current(ctx).system_info


def log(key: str, value: Any, data_type: Any = None, ctx: _Client | None = None, **where: Any) -> None:
    """Send a scalar. It appears in the site's log, and its last value in the round's metrics.

    Args:
        key: its name.
        value: a number, numpy scalar or one-element tensor.
        data_type: an `AnalyticsDataType`. `SCALARS` and `METRICS` take a dict of numbers. `TEXT`,
            `PARAMETER`, `TAG`, `PARAMETERS` and `TAGS` are only written to the site's log. `IMAGE`,
            `LOG_RECORD`, `MODEL` and `INIT_DATA` are refused.
        ctx: the value that `init` returned.
        where: further values for the log, for example `global_step=12`.
    """
    client = _current(ctx)
    where = {name: each for name, each in where.items() if each is not None}
    numbers, texts = _entries(str(key), value, data_type)
    for name, number in numbers.items():
        client.log(name, number, **where)
    for name, text in texts.items():
        client.note(name, text)


def shutdown(ctx: _Client | None = None) -> None:
    """Leave the session. The script may continue, but takes part in no further rounds."""
    _current(ctx).shutdown()
