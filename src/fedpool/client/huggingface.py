"""The client API for the `Trainer` of Hugging Face transformers.

::

    import fedpool.client.huggingface as flare

    trainer = Trainer(model=model, args=args, train_dataset=..., eval_dataset=...)
    flare.patch(trainer)
    while flare.is_running():
        trainer.evaluate()  # optional: scores the received model
        trainer.train()     # starts from the received model, and sends at the end

This module also exports everything that `fedpool.client` exports. Under torchrun only rank 0 talks
to the host. FSDP and DeepSpeed are refused, because that process wouldn't have the whole model.
"""

from collections.abc import Mapping
from typing import Any, Literal

from transformers import Trainer

import fedpool.client
from fedpool.client import *  # noqa: F403  # one import line gives a script both
from fedpool.client import _ensure_started
from fedpool.client.exchange import Exchange, register
from fedpool.client.huggingface_rounds import Hooks, Rounds, Streamed, user_model
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
    """Have a trainer's `train` and `evaluate` take part in the rounds. Calls `flare.init()` if
    needed.

    `train` loads the received model, trains for the epochs or steps in its arguments and sends. The
    weight of the update is the number of optimizer steps. `evaluate` scores the received model; its
    metrics, without the timings, are sent with the update. Evaluations within `train` stay local.

    In an `evaluate` round, `evaluate` sends and `train` does nothing; if the script doesn't call
    `evaluate`, `train` evaluates and sends. In a `submit_model` round, `train` sends the model that
    was last trained here.

    The learning rate schedule that the trainer makes spans the job: its length is the steps of the
    first round times the number of rounds. A schedule of your own continues where it was.

    A number `fedprox_mu` in the config adds mu/2 * ||w - w_global||^2 to the loss, after gradient
    clipping. SCAFFOLD's corrections and FedNova's step counts are applied too; for FedNova the
    weight is the number of rows of the training data.

    If the model has a dict `__fl_meta__`, it is sent as the update's `meta`; a
    `NUM_STEPS_CURRENT_ROUND` in it is the weight.

    A second call for the same trainer with the same options changes nothing; a second trainer
    causes a warning.

    Args:
        trainer: before its first `train`, with a `model`.
        params_scope: "all" exchanges the whole model. "trainable" exchanges only the parameters
            that require a gradient, such as a PEFT model's adapters; the recipe's model must hold
            only these. Adapters may have the model's names or those of `get_peft_model_state_dict`.
            "auto" is "trainable" for a PEFT model, unless the received model is the whole one, and
            "all" for any other. "model" and "adapter" are NVFlare's names for "all" and, for PEFT
            models only, "trainable".
        server_key_prefix: prefix that received names may have in addition to the model's own, and
            that sent ones get.
        local_epochs, local_steps: length of a round's training, in place of the trainer's
            arguments; give only one of them.
        stream_metrics: whether the values that the trainer logs, such as the loss, are sent to the
            host as with `flare.log`.
        restore_state: whether optimizer, schedule and grad scaler continue where the last round
            left them; otherwise each round starts with fresh ones, and the schedule spans the
            round.
        load_state_dict_strict: NVFlare's name for `strict`, which it overrides. Unlike
            `strict=False`, False still refuses a different shape for the same name, and params that
            have no name in common with the model.
        strict: whether the received params must have the model's names and shapes. Otherwise those
            that fit are loaded, and the others are sent back unchanged.

    Returns: the trainer.

    Raises:
        ClientError: not a trainer, an unknown scope, adapters of a model that has none, both epochs
            and steps, `model_init`, FSDP or DeepSpeed, or a trainer that was patched with other
            options. `train` raises it for a model that doesn't fit and for a checkpoint to resume
            from, which would replace the received model.
    """
    scope = _SCOPES.get(params_scope)
    if scope is None:
        raise ClientError(f"params_scope must be one of {', '.join(map(repr, _SCOPES))}, got {params_scope!r}")
    _check_trainer(trainer, needs_adapters=params_scope == "adapter")
    _check_length(local_epochs, local_steps)
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
    rounds = Rounds(trainer, exchange, restore_state)
    trainer.add_callback(Hooks(rounds))
    if stream_metrics:
        trainer.add_callback(Streamed(client))
    trainer.train, trainer.evaluate = rounds.train, rounds.evaluate
    if restore_state:
        trainer.create_scheduler = rounds.create_scheduler
    return trainer


def _check_trainer(trainer: Any, *, needs_adapters: bool) -> None:
    if Trainer not in type(trainer).__mro__:  # with isinstance(), mypy would trust its annotations, e.g. of model_init
        raise ClientError(f"patch() takes a transformers.Trainer, got {type(trainer).__name__}")
    if trainer.model_init is not None:
        raise ClientError("model_init makes a new model in each train(): give Trainer(model=...)")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ClientError(
            "FSDP and DeepSpeed do not keep the whole model in the process that sends it: use DDP, or a single device"
        )
    model = user_model(trainer)
    if needs_adapters and not is_peft(model):
        raise ClientError(
            f'params_scope="adapter" is for PEFT models, but this is a {type(model).__name__}: use "trainable" or "all"'
        )


def _check_length(local_epochs: float | None, local_steps: int | None) -> None:
    if local_epochs is not None and local_steps is not None:
        raise ClientError(f"give local_epochs or local_steps, not both: got {local_epochs!r} and {local_steps!r}")
    for name, value in (("local_epochs", local_epochs), ("local_steps", local_steps)):
        if value is not None and not value > 0:
            raise ClientError(f"{name} must be a number above 0, got {value!r}")
