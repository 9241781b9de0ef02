"""The client API for the `Trainer` of Hugging Face transformers.

::

    import fedpool.client.huggingface as flare

    trainer = Trainer(model=model, args=args, train_dataset=..., eval_dataset=...)
    flare.patch(trainer)
    while flare.is_running():
        trainer.evaluate()  # optional: scores the received model
        trainer.train()     # starts from the received model, and sends at its end

Everything that `fedpool.client` exports is here too. Under torchrun rank 0 talks. FSDP and DeepSpeed are refused: the
model is not whole in the process that talks.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sized
from copy import deepcopy
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

import fedpool.client
from fedpool.client import *  # noqa: F403  # one import line gives a script both
from fedpool.client import _ensure_started
from fedpool.client.api import Client
from fedpool.client.exchange import Exchange, register, rows_of
from fedpool.client.proximal import ProximalTerm
from fedpool.client.scopes import Scope, automatic, is_peft, prefixed, trainable, whole
from fedpool.errors import ClientError

__all__ = ["patch"]
__all__ += fedpool.client.__all__

_SCOPES: Mapping[str, Scope] = {
    "auto": automatic,
    "all": whole,
    "trainable": trainable,
    "model": whole,  # NVFlare's names
    "adapter": trainable,
}
_TIMINGS = ("_runtime", "_per_second", "_model_preparation_time")
"""How the names end of what `evaluate` returns beside the model's scores and the `epoch`."""


def patch(
    trainer: Any,
    restore_state: bool = True,
    load_state_dict_strict: bool | None = None,
    params_scope: Literal["auto", "all", "trainable", "model", "adapter"] = "auto",
    server_key_prefix: str | None = None,
    local_epochs: float | None = None,
    local_steps: int | None = None,
    stream_metrics: bool = False,
    *,
    strict: bool = True,
) -> Any:
    """Have a trainer's `train` and `evaluate` take part in the rounds; calls `flare.init()` if nobody has.

    `train` loads the received model, trains for the epochs or steps of its arguments and sends; the weight of the update
    is the number of optimizer steps. `evaluate` scores the received model; its metrics, without the timings, are sent with
    the update. Evaluation within `train` is the script's own affair.

    In an `evaluate` round `evaluate` sends and `train` does nothing; without a call of `evaluate`, `train` evaluates and
    sends. In a `submit_model` round `train` sends the model that was last trained here.

    The learning rate schedule that the trainer makes spans the job: it takes the steps of the first round times the number
    of rounds for its length. A schedule of your own goes on where it was.

    A number `fedprox_mu` in the config adds mu/2 * ||w - w_global||^2 to the loss, after gradient clipping. What SCAFFOLD and
    FedNova want of the steps is done, too; for FedNova the weight is the rows of the training data.

    A dict `__fl_meta__` of the model is sent as the update's `meta`; a `NUM_STEPS_CURRENT_ROUND` in it is the weight.

    A second call for the same trainer and with the same options changes nothing; a second trainer is warned about.

    Args:
        trainer: before its first `train`, with a `model`.
        params_scope: "all" exchanges the whole model. "trainable" exchanges only the parameters that require a gradient, such
            as a PEFT model's adapters; the recipe's model must hold just these. Adapters may be named as the model does or as
            `get_peft_model_state_dict` does. "auto" is "trainable" for a PEFT model, unless the whole of it is received, and
            "all" for any other. "model" and "adapter" are NVFlare's names for "all" and, for PEFT models only, "trainable".
        server_key_prefix: what received names may, and sent ones will, begin with beyond the model's own.
        local_epochs, local_steps: how long a round trains, in place of what the trainer's arguments say; one of them.
        stream_metrics: whether what the trainer logs, as the loss, is sent to the host as by `flare.log`.
        restore_state: whether optimizer, schedule and grad scaler go on where the last round left them; otherwise each
            round starts with fresh ones, and the schedule spans the round.
        load_state_dict_strict: NVFlare's name for `strict`, which it overrides. Unlike `strict=False`, False still refuses
            another shape for the same name, and params of which no name is the model's.
        strict: whether names and shapes of the received params must be those of the model. Otherwise what fits is
            loaded, and what does not is sent back as it came.

    Returns: the trainer.

    Raises:
        ClientError: not a trainer, an unknown scope, adapters of a model that has none, both epochs and steps, `model_init`,
            FSDP or DeepSpeed, or a trainer that was patched with other options. `train` raises it for a model that
            does not fit and for a checkpoint to resume from, which would replace the received model.
    """
    if (
        Trainer not in type(trainer).__mro__
    ):  # isinstance() would have mypy believe what its annotations say of model_init
        raise ClientError(f"patch() takes a transformers.Trainer, got {type(trainer).__name__}")
    scope = _SCOPES.get(params_scope)
    if scope is None:
        raise ClientError(f"params_scope must be one of {', '.join(map(repr, _SCOPES))}, got {params_scope!r}")
    if local_epochs is not None and local_steps is not None:
        raise ClientError(f"give local_epochs or local_steps, not both: got {local_epochs!r} and {local_steps!r}")
    for name, value in (("local_epochs", local_epochs), ("local_steps", local_steps)):
        if value is not None and not value > 0:
            raise ClientError(f"{name} must be a number above 0, got {value!r}")
    if trainer.model_init is not None:
        raise ClientError("model_init makes a new model in each train(): give Trainer(model=...)")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ClientError(
            "FSDP and DeepSpeed do not keep the whole model in the process that sends it: use DDP, or a single device"
        )
    if params_scope == "adapter" and not is_peft(_model(trainer)):
        raise ClientError(
            f'params_scope="adapter" is for PEFT models, and this is a {type(_model(trainer)).__name__}: use "trainable" or "all"'
        )
    client = _ensure_started()
    options = {
        "restore_state": bool(restore_state),
        "load_state_dict_strict": load_state_dict_strict,
        "params_scope": params_scope,
        "server_key_prefix": server_key_prefix or "",
        "local_epochs": local_epochs,
        "local_steps": local_steps,
        "stream_metrics": bool(stream_metrics),
        "strict": bool(strict),
    }
    if not register(client, trainer, options):
        return trainer
    if trainer.args.world_size > 1:
        client.join_ranks(trainer.args.process_index)
    if local_steps is not None:
        trainer.args.max_steps = local_steps
    elif local_epochs is not None:
        trainer.args.num_train_epochs, trainer.args.max_steps = local_epochs, -1
    if server_key_prefix:
        scope = prefixed(scope, server_key_prefix)
    if load_state_dict_strict is not None:
        strict = load_state_dict_strict
    exchange = Exchange(client, strict=strict, same_shapes=load_state_dict_strict is False, scope=scope)
    rounds = _Rounds(trainer, exchange, restore_state)
    trainer.add_callback(_Hooks(rounds))
    if stream_metrics:
        trainer.add_callback(_Streamed(client))
    trainer.train, trainer.evaluate = rounds.train, rounds.evaluate
    if restore_state:
        trainer.create_scheduler = rounds.create_scheduler
    return trainer


class _Rounds:
    """What a patched trainer does in place of its own methods."""

    def __init__(self, trainer: Any, exchange: Exchange, restore_state: bool) -> None:
        self._trainer = trainer
        self._exchange = exchange
        self._train: Callable[..., TrainOutput] = trainer.train
        self._evaluate: Callable[..., dict[str, float]] = trainer.evaluate
        self._create_scheduler: Callable[..., LRScheduler] = trainer.create_scheduler
        self._train_signature = inspect.signature(trainer.train)
        self._scheduler: LRScheduler | None = None
        self._fresh = None if restore_state else _FreshState(trainer)
        self._busy = False  # the trainer evaluates within train(), and evaluates its datasets one by one

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See `patch`; the script's own within `train`, after the round was sent, and after the job."""
        if self._busy or self._exchange.receive_to_score() is None:
            return self._evaluate(*args, **kwargs)
        if self._exchange.client.task_name == "submit_model":
            return {}
        return self._score(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """See `patch`; the script's own after the job. Where nothing is trained the output tells of 0 steps."""
        nothing = TrainOutput(0, 0.0, {})
        if self._exchange.take_answered():
            return nothing
        if self._exchange.receive() is None:
            return self._train(*args, **kwargs)
        call = self._train_signature.bind(*args, **kwargs).arguments
        if call.get("resume_from_checkpoint"):
            raise ClientError(
                "train(resume_from_checkpoint=...) would replace the received model: leave resume_from_checkpoint out"
            )
        match self._exchange.client.task_name:
            case "evaluate":
                self._score()
                self._exchange.take_answered()
            case "submit_model":
                self._exchange.send_own()
            case _:
                return self._train_and_send(*args, **kwargs)
        return nothing

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """The one schedule of the job: transformers drops the one it made in each `train`."""
        model = self._exchange.receive() if self._busy else None
        if model is None or self._trainer.lr_scheduler is not None:
            return self._create_scheduler(num_training_steps, optimizer)
        if self._scheduler is None:
            num_rounds = model.total_rounds or 1
            self._scheduler = self._create_scheduler(num_training_steps * num_rounds, optimizer)
        self._trainer.lr_scheduler = self._scheduler
        self._trainer._created_lr_scheduler = True
        return self._scheduler

    def proximal_term(self) -> ProximalTerm | None:
        """The FedProx term of the round that is being trained; None outside of one."""
        return self._exchange.proximal_term(_model(self._trainer)) if self._busy else None

    def begin_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """See `Exchange.begin_steps`; outside of a round, nothing."""
        if self._busy and self._exchange.client.task_name == "train":
            self._exchange.begin_steps(_model(self._trainer), [optimizer])

    def _train_and_send(self, *args: Any, **kwargs: Any) -> TrainOutput:
        rows = self._trainer.train_dataset
        num_rows = rows_of([rows]) if self._exchange.weighs_rows and rows is not None else 0
        if isinstance(rows, Sized) and len(rows) == 0:  # transformers would raise
            self._exchange.send_untrained(_model(self._trainer))
            return TrainOutput(0, 0.0, {})
        self._exchange.load(_model(self._trainer))
        if self._fresh is not None:
            self._fresh.restore(self._trainer)
        self._busy = True
        try:
            output = self._train(*args, **kwargs)
        finally:
            self._busy = False
        self._exchange.send_trained(_model(self._trainer), self._trainer.state.global_step, num_rows)
        return output

    def _score(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._exchange.load(_model(self._trainer))
        self._busy = True
        try:
            with torch.random.fork_rng(devices=[]):
                metrics = self._evaluate(*args, **kwargs)
        finally:
            self._busy = False
        scores = {name: value for name, value in metrics.items() if name != "epoch" and not name.endswith(_TIMINGS)}
        self._exchange.scored(scores)
        return metrics


class _Hooks(TrainerCallback):
    """Where transformers calls back: the FedProx term goes into the optimizer for the time of one `train`."""

    def __init__(self, rounds: _Rounds) -> None:
        self._rounds = rounds
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._remove()  # of a train() that raised
        self._rounds.begin_steps(_unwrapped(optimizer))
        term = self._rounds.proximal_term()
        if term is None:
            return
        # In the step itself, where accelerate has unscaled the gradients; all but those of a fused optimizer, which does so
        # in the step and has the factor from the scaler by then.
        inner = _unwrapped(optimizer)

        def add(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            scale = getattr(stepped, "grad_scale", None)
            term.add_gradients(stepped, 1.0 if scale is None else scale)

        self._handle = inner.register_step_pre_hook(add)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _Streamed(TrainerCallback):
    """Sends what the trainer logs, with its step; of what is no number nothing is sent."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, value in (logs or {}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._client.log(name, value, global_step=state.global_step)


class _FreshState:
    """The state that each round starts from when none is to be kept."""

    def __init__(self, trainer: Any) -> None:
        self._optimizer = _state_of(trainer.optimizer)
        self._scheduler = _state_of(trainer.lr_scheduler)
        self._scaler = _state_of(getattr(trainer.accelerator, "scaler", None))

    def restore(self, trainer: Any) -> None:
        """Put it back; what the trainer has made by itself it makes anew."""
        if self._optimizer is None:
            trainer.optimizer = None
        else:
            trainer.optimizer.load_state_dict(deepcopy(self._optimizer))
        if self._scheduler is None:
            trainer.lr_scheduler = None
        else:
            trainer.lr_scheduler.load_state_dict(deepcopy(self._scheduler))
        if self._scaler is not None:
            trainer.accelerator.scaler.load_state_dict(self._scaler)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """torch's own optimizer, without what accelerate wraps it in."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _state_of(stateful: Any) -> Mapping[str, Any] | None:
    return None if stateful is None else deepcopy(stateful.state_dict())


def _model(trainer: Any) -> torch.nn.Module:
    """The user's model, without what wraps it."""
    model: torch.nn.Module = trainer.model
    return model
