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

Function names, `FLModel` and `ParamsType` are those of `nvflare.client`. Importing this module
costs neither Prefect nor torch. Run with no host around, a script goes through one round on its own
initial weights.
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
            raise ClientError(f"ctx must be what flare.init() has returned, got {type(ctx).__name__}: leave it out")
        return ctx
    if _client is None:
        raise ClientError("the client API is not initialised: call flare.init() first")
    return _client


def _ensure_started(rank: int | None = None) -> _Client:
    """The client, connected to its host if `init` was not called yet; for the trainer
    integrations.
    """
    global _client
    if _client is None:
        _client = _start(rank, "torch")
    return _client


def init(
    rank: int | str | None = None, config_file: Any = None, *, params_format: ParamsFormat | None = None
) -> _Client:
    """Connect this script to its host; call it once, before anything else.

    Args:
        rank: the global rank of this process under torchrun; only rank 0 talks. Read from `RANK`
            when None.
        config_file: accepted for compatibility and not read, which a warning says: recipe and site
            configure the script.
        params_format: "torch" or "numpy": how params arrive. None: torch when the script has
            imported it, else numpy.

    Returns: what the other functions take as `ctx`. They do without: a process is one client.

    A second call warns and changes nothing.
    """
    global _client
    if _client is not None:
        warnings.warn("flare.init() was called already: this call changes nothing", stacklevel=2)
        return _client
    if config_file is not None:
        warnings.warn(
            f"flare.init(config_file={str(config_file)!r}) is not read: the recipe and the site configure this script, "
            "see flare.get_config()",
            stacklevel=2,
        )
    _client = _start(None if rank is None else int(rank), params_format)
    return _client


def is_running(ctx: _Client | None = None) -> bool:
    """Block until there is an assignment (True) or the job is over (False).

    Raises:
        ClientError: the script has gone through a round without `send()`.
    """
    return _current(ctx).is_running()


def receive(timeout: float | None = None, ctx: _Client | None = None) -> FLModel | None:
    """The global model of the round; the same one when called again in the round.

    Args:
        timeout: seconds to wait for an assignment; None waits until there is one or the job is
            over.

    Returns: a model with `params`, `current_round`, `total_rounds` and `meta`; None after `timeout`
    or when the job is over.
    """
    return _current(ctx).receive(timeout)


def send(model: FLModel, clear_cache: bool = True, ctx: _Client | None = None) -> None:
    """Send the round's update, once a round, after `receive()`.

    Args:
        model: `params` (name -> torch tensor or numpy array), `metrics` (name -> number, the score
            of the *received* model), or both; `meta["NUM_STEPS_CURRENT_ROUND"]` is the update's
            weight (1 when absent).
        clear_cache: accepted for compatibility; nothing is cached past a send.

    Raises:
        ClientError: out of order, not an `FLModel`, neither params nor metrics, or params that are
            not a dict of arrays.
    """
    _current(ctx).send(model)


def keep(name: str, params: Mapping[str, Any]) -> None:
    """Keep tensors at this site, from this round to the next ones, whatever becomes of this
    process. They never leave the site.

    A round that is asked for again starts from what was kept before it, so keep all that training
    goes on from.

    Args:
        name: what to find them by: letters, digits, `.`, `_` and `-`.
        params: name -> torch tensor or numpy array.

    Raises:
        ClientError: outside a round.
    """
    _current().keep(name, params)


def kept(name: str, *, initial: bool = False) -> dict[str, Any] | None:
    """What this site kept under a name in an earlier round; None when there is nothing.

    Args:
        initial: where there is nothing, give the model that a site's own one starts from: the job's
            initial model with a recipe that says so (`DittoRecipe(personal_start="initial")`), else
            the received one.

    Raises:
        ClientError: outside a round.
    """
    return _current().kept(name, initial=initial)


def is_train(ctx: _Client | None = None) -> bool:
    """Whether the assignment is to train the received model."""
    return _current(ctx).task_name == "train"


def is_evaluate(ctx: _Client | None = None) -> bool:
    """Whether the assignment is to score the received model and send metrics only."""
    return _current(ctx).task_name == "evaluate"


def is_submit_model(ctx: _Client | None = None) -> bool:
    """Whether the assignment is to send the site's own model."""
    return _current(ctx).task_name == "submit_model"


def get_job_id(ctx: _Client | None = None) -> str:
    """The id of the job that this script works for."""
    return _current(ctx).job_id


def get_site_name(ctx: _Client | None = None) -> str:
    """The name of the site that this script runs at."""
    return _current(ctx).site_name


def get_task_name(ctx: _Client | None = None) -> str:
    """`train`, `evaluate` or `submit_model`."""
    return _current(ctx).task_name


def get_config(ctx: _Client | None = None) -> dict[str, Any]:
    """What the recipe (`config`, over that `per_site_config`) and, over both, the site itself
    configured for this script.
    """
    return _current(ctx).config


def system_info(ctx: _Client | None = None) -> dict[str, str | int]:
    """`job_id`, `site_name`, and `site_index` of `num_sites`: sites count from 0 in the natural
    order of their names.
    """
    return _current(ctx).system_info


def log(key: str, value: Any, data_type: Any = None, ctx: _Client | None = None, **where: Any) -> None:
    """Send a scalar: it shows in the site's log and, with its last value, in the round's metrics.

    Args:
        key: its name.
        value: a number, numpy scalar or one-element tensor.
        data_type: an `AnalyticsDataType`: `SCALARS` and `METRICS` take a dict of numbers; `TEXT`,
            `PARAMETER`, `TAG` and the dicts of them go to the site's log only. Anything else is
            ignored.
        ctx: what `init` has returned.
        where: what else to show in the log, for example `global_step=12`.
    """
    client = _current(ctx)
    where = {name: each for name, each in where.items() if each is not None}
    numbers, texts = _entries(str(key), value, data_type)
    for name, number in numbers.items():
        client.log(name, number, **where)
    for name, text in texts.items():
        client.note(name, text)


def shutdown(ctx: _Client | None = None) -> None:
    """Leave the session; the script may go on, but takes part in nothing more."""
    _current(ctx).shutdown()
