"""The client API for a Lightning `Trainer`, of `pytorch_lightning` or `lightning.pytorch`.

::

    import fedpool.client.lightning as flare

    trainer = Trainer(max_epochs=1)
    flare.patch(trainer)
    while flare.is_running():
        trainer.validate(model, datamodule=dm)  # optional: scores the received model
        trainer.fit(model, datamodule=dm)  # starts from the received model, and sends at the end

`Trainer(logger=flare.logger())` sends the values that the module logs. This module also exports
everything that `fedpool.client` exports. Sharded strategies (FSDP, DeepSpeed) and those that start
processes inside `fit` (`ddp_spawn`) are refused, because the process that talks to the host
wouldn't have the whole model.
"""

import importlib
from types import ModuleType
from typing import Any

import fedpool.client
from fedpool.client import *  # noqa: F403  # one import line gives a script both
from fedpool.client import _ensure_started
from fedpool.client.api import Client
from fedpool.client.exchange import Exchange, register
from fedpool.client.lightning_logger import logger
from fedpool.client.lightning_rounds import Hooks, Rounds
from fedpool.errors import ClientError

__all__ = ["logger", "patch"]
__all__ += fedpool.client.__all__

_TRAINER_MODULE = ".trainer.trainer"
_PACKAGES = ("pytorch_lightning", "lightning.pytorch")


def patch(
    trainer: Any,
    restore_state: bool = True,
    load_state_dict_strict: bool | None = None,
    update_fit_loop: bool = True,
    *,
    strict: bool = True,
) -> None:
    """Have a trainer's `fit` and `validate` take part in the rounds. Calls `flare.init()` if
    needed.

    `fit` loads the received model, trains and sends. `max_epochs`, `max_steps` and their minima
    count per round, while `trainer.current_epoch` and `trainer.global_step` continue to count.
    `validate` scores the received model; the values that it logs are sent with the update. It
    restores torch's generator, so scoring doesn't change a bit of the training. Validation within
    `fit` stays local. The weight of the update is the number of optimizer steps.

    In an `evaluate` round, `validate` sends and `fit` does nothing; if the script doesn't call
    `validate`, `fit` runs its validation loop and sends. In a `submit_model` round, `fit` sends the
    best checkpoint if a `ModelCheckpoint` monitors a metric, else the model that was last trained
    here; `validate` returns an empty list.

    A number `fedprox_mu` in the config adds mu/2 * ||w - w_global||^2 to the loss, before gradient
    clipping. SCAFFOLD's corrections and FedNova's step counts are applied too; for FedNova the
    weight is the number of rows of the training data.

    If the module has a dict `__fl_meta__`, it is sent as the update's `meta`; a
    `NUM_STEPS_CURRENT_ROUND` in it is the weight.

    With `strategy="ddp"` this call, not the first `fit`, starts the other ranks, because they must
    learn the host's answers too. A second call for the same trainer with the same options changes
    nothing; a second trainer causes a warning.

    Args:
        trainer: of either package, before its first `fit`.
        restore_state: whether optimizers, learning rate schedulers and the grad scaler continue
            where the last round left them; otherwise each round starts with fresh ones.
        load_state_dict_strict: NVFlare's name for `strict`, which it overrides. Unlike
            `strict=False`, False still refuses a different shape for the same name, and params that
            have no name in common with the model.
        update_fit_loop: False leaves `max_epochs` and `max_steps` to the script: they then count
            over all rounds, and a round that begins at the limit trains nothing.
        strict: whether the received params must have the model's names and shapes. Otherwise those
            that fit are loaded, and the others are sent back unchanged.

    Raises:
        ClientError: not a trainer, a refused strategy, or a trainer that was patched with other
            options. `fit` raises it for a model that doesn't fit and for a `ckpt_path`, which would
            replace the received model.
    """
    package = _package_of(trainer)
    strategies = importlib.import_module(f"{package.__name__}.strategies")
    launcher = trainer.strategy.launcher
    if not isinstance(trainer.strategy, (strategies.SingleDeviceStrategy, strategies.DDPStrategy)) or (
        launcher is not None and not isinstance(launcher, strategies.launchers._SubprocessScriptLauncher)
    ):
        raise ClientError(
            f"strategy {type(trainer.strategy).__name__} does not keep a whole model in the process that calls "
            'fit(): use Trainer(strategy="ddp"), or a single device'
        )
    client = _ensure_started(rank=trainer.global_rank)
    options = {
        "restore_state": bool(restore_state),
        "load_state_dict_strict": load_state_dict_strict,
        "update_fit_loop": bool(update_fit_loop),
        "strict": bool(strict),
    }
    if not register(client, trainer, options):
        return
    if trainer.world_size > 1:
        _start_ranks(trainer, client)
    if load_state_dict_strict is not None:
        strict = load_state_dict_strict
    exchange = Exchange(client, strict=strict, same_shapes=load_state_dict_strict is False)
    rounds = Rounds(trainer, package, exchange, restore_state, update_fit_loop)
    hooks = type("FedpoolCallback", (Hooks, package.callbacks.Callback), {})(rounds)
    trainer.callbacks.insert(0, hooks)  # first: other callbacks' hooks see the received model
    trainer.fit, trainer.validate = rounds.fit, rounds.validate


def _start_ranks(trainer: Any, client: Client) -> None:
    """Start the other ranks, unless torchrun or a cluster did, and join them; each runs the script
    up to here.
    """
    if (launcher := trainer.strategy.launcher) is not None:
        launcher.launch(trainer.strategy.setup_environment)
    else:
        trainer.strategy.setup_environment()
    client.join_ranks(trainer.global_rank)


def _package_of(trainer: Any) -> ModuleType:
    """The package of a trainer. Both packages have the same code, but separate classes."""
    for base in type(trainer).__mro__:
        package = base.__module__.removesuffix(_TRAINER_MODULE)
        if base.__name__ == "Trainer" and base.__module__ != package and package in _PACKAGES:
            return importlib.import_module(package)
    raise ClientError(f"patch() takes a Trainer of {' or '.join(_PACKAGES)}, got {type(trainer).__name__}")
