"""The `fit` and `validate` of a patched Lightning `Trainer`, and the state kept between rounds."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import torch

from fedpool.client.exchange import Exchange, rows_of
from fedpool.client.proximal import ProximalTerm
from fedpool.errors import ClientError


class Rounds:
    """The `fit` and `validate` of a patched trainer."""

    def __init__(
        self, trainer: Any, package: ModuleType, exchange: Exchange, restore_state: bool, update_fit_loop: bool
    ) -> None:
        self._trainer = trainer
        self._data_module = package.LightningDataModule
        self._exchange = exchange
        self._restore_state = restore_state
        self._update_fit_loop = update_fit_loop
        self._fit = trainer.fit
        self._validate = trainer.validate
        self._fit_signature = inspect.signature(trainer.fit)
        self._validate_signature = inspect.signature(trainer.validate)
        self._precision = trainer.precision_plugin.state_dict()
        self._state: _TrainingState | None = None
        self._term: ProximalTerm | None = None
        self._generator: torch.Tensor | None = None
        self._first_step = self._num_rows = 0
        self._fitting = self._scoring = False

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        """See `lightning.patch`. With a checkpoint, after the round was sent and after the job, the
        trainer's own.
        """
        call = self._validate_signature.bind(*args, **kwargs).arguments
        if call.get("ckpt_path") is not None or self._exchange.receive_to_score() is None:
            return self._validate(*args, **kwargs)
        if self._exchange.client.task_name == "submit_model":
            return []
        if call.get("model") is None:  # given a model, Lightning doesn't look for a checkpoint to load
            call["model"] = self._trainer.lightning_module
        return self._score(**call)

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """See `lightning.patch`. After the job, the trainer's own."""
        call = self._fit_signature.bind(*args, **kwargs).arguments
        if self._exchange.take_answered():
            return
        if self._exchange.receive() is None:
            self._fit(*args, **kwargs)
            return
        if call.get("ckpt_path") is not None:
            raise ClientError("fit(ckpt_path=...) would replace the received model: leave ckpt_path out")
        match self._exchange.client.task_name:
            case "train":
                self._train(**call)
            case "evaluate":
                data = call.get("datamodule")
                if isinstance(call.get("train_dataloaders"), self._data_module):
                    data = call["train_dataloaders"]
                self._score(model=call["model"], dataloaders=call.get("val_dataloaders"), datamodule=data)
                self._exchange.take_answered()
            case "submit_model":
                self._exchange.send_own(_best_checkpoint(self._trainer))

    def begin_scoring(self, module: torch.nn.Module) -> None:
        """Load the received model, once Lightning has set the module up."""
        if self._scoring:
            with torch.inference_mode(False):  # or tensors that the load creates could never be trained
                self._exchange.load(module)

    def begin_training(self, module: torch.nn.Module) -> None:
        """Load the received model and the last round's state, once module and optimizers are set
        up.
        """
        if not self._fitting:
            return
        self._exchange.load(module)
        self._term = self._exchange.proximal_term(module)
        if not self._restore_state:
            self._trainer.precision_plugin.load_state_dict(self._precision)  # the trainer keeps its grad scaler
        elif self._state is not None:
            self._state.restore(self._trainer)
        self._exchange.begin_steps(module, self._trainer.optimizers)
        self._first_step = self._trainer.global_step
        if self._update_fit_loop:
            _extend(self._trainer.fit_loop, epochs=self._trainer.current_epoch, steps=self._first_step)

    def count_rows(self) -> None:
        """Count the rows that the site trains with, once its data is loaded, if they are the
        update's weight.
        """
        if self._fitting and self._exchange.weighs_rows:
            loaders = self._trainer.fit_loop._combined_loader.flattened
            self._num_rows = rows_of([getattr(loader, "dataset", loader) for loader in loaders])

    def rewind_generator(self) -> None:
        """Undo the effect of Lightning starting to iterate the training data twice, in each `fit`
        but the first.

        The second start draws a different shuffling seed than a plain loop, or the first `fit`,
        would.
        """
        if self._fitting and self._generator is not None and self._trainer.current_epoch > 0:
            torch.set_rng_state(self._generator)

    def add_proximal_term(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradient of FedProx's term to an optimizer's gradients, just before it steps."""
        if self._fitting and self._term is not None:
            self._term.add_gradients(optimizer, _gradient_scale(self._trainer, optimizer))

    def _train(self, **call: Any) -> None:
        limits = _Limits.of(self._trainer.fit_loop)
        self._fitting = True
        self._generator = torch.get_rng_state()
        try:
            self._fit(**call)
        finally:
            self._fitting = False
            self._term = self._generator = None
            if self._update_fit_loop:
                limits.restore(self._trainer.fit_loop)
        if self._restore_state:
            self._state = _TrainingState.of(self._trainer)
        num_steps = self._trainer.global_step - self._first_step
        self._exchange.send_trained(self._trainer.lightning_module, num_steps, self._num_rows)

    def _score(self, **call: Any) -> Any:
        self._scoring = True
        try:
            with torch.random.fork_rng(devices=[]):
                results = self._validate(**call)
        finally:
            self._scoring = False
        self._exchange.scored(self._trainer.callback_metrics)
        return results


class Hooks:
    """Lightning's callbacks; mixed into the `Callback` of the trainer's own package."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds

    def on_fit_start(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Load the received model."""
        self._rounds.begin_training(pl_module)

    def on_train_start(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Set the round's random state, and count the rows if the recipe needs them."""
        self._rounds.rewind_generator()
        self._rounds.count_rows()

    def on_before_optimizer_step(self, trainer: Any, pl_module: torch.nn.Module, optimizer: Any) -> None:
        """Add the gradient of the proximal term, if the recipe has one."""
        self._rounds.add_proximal_term(optimizer)

    def on_validation_start(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Load the received model, which is to be scored."""
        self._rounds.begin_scoring(pl_module)


@dataclass(frozen=True, slots=True)
class _TrainingState:
    """Optimizers and schedulers at the end of a round, because Lightning makes new ones in each
    `fit`.
    """

    optimizers: list[Mapping[str, Any]]
    schedulers: list[Mapping[str, Any]]

    @classmethod
    def of(cls, trainer: Any) -> "_TrainingState":
        return cls(
            [optimizer.state_dict() for optimizer in trainer.optimizers],
            [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        )

    def restore(self, trainer: Any) -> None:
        optimizers = trainer.optimizers
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        if (len(optimizers), len(schedulers)) != (len(self.optimizers), len(self.schedulers)):
            raise ClientError(
                f"configure_optimizers() gave {len(optimizers)} optimizers and {len(schedulers)} schedulers, but in the round "
                f"before {len(self.optimizers)} and {len(self.schedulers)}: use flare.patch(trainer, restore_state=False)"
            )
        for target, state in zip((*optimizers, *schedulers), (*self.optimizers, *self.schedulers), strict=True):
            target.load_state_dict(state)


@dataclass(frozen=True, slots=True)
class _Limits:
    """A fit loop's limits from the script, as `configure_optimizers` sees them in every round."""

    min_epochs: int | None
    max_epochs: int | None
    min_steps: int | None
    max_steps: int

    @classmethod
    def of(cls, loop: Any) -> "_Limits":
        return cls(loop.min_epochs, loop.max_epochs, loop.epoch_loop.min_steps, loop.epoch_loop.max_steps)

    def restore(self, loop: Any) -> None:
        loop.min_epochs, loop.max_epochs = self.min_epochs, self.max_epochs
        loop.epoch_loop.min_steps, loop.epoch_loop.max_steps = self.min_steps, self.max_steps


def _extend(loop: Any, *, epochs: int, steps: int) -> None:
    """Let a fit loop that has done these epochs and steps do as many more as its limits say."""

    def extended(limit: int | None, done: int) -> int | None:
        return limit if limit is None or limit < 0 else limit + done  # None and -1: unlimited

    loop.min_epochs, loop.max_epochs = extended(loop.min_epochs, epochs), extended(loop.max_epochs, epochs)
    inner = loop.epoch_loop
    inner.min_steps, inner.max_steps = extended(inner.min_steps, steps), extended(inner.max_steps, steps)


def _gradient_scale(trainer: Any, optimizer: Any) -> float:
    """The factor in the gradients: 1 unless the optimizer unscales in its own step (if fused)."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    scale: float = scaler.get_scale()
    return scale


def _best_checkpoint(trainer: Any) -> Mapping[str, Any] | None:
    """The state dict of the best checkpoint by a metric; None if there is none."""
    checkpoints = [
        Path(callback.best_model_path)
        for callback in trainer.checkpoint_callbacks
        if getattr(callback, "monitor", None) and getattr(callback, "best_model_path", "")
    ]
    if not checkpoints:
        return None
    try:
        loaded = torch.load(checkpoints[0], map_location="cpu", weights_only=True)
    except (OSError, UnpicklingError) as error:
        raise ClientError(f"the best checkpoint {str(checkpoints[0])!r} cannot be read as tensors: {error}") from error
    state: Mapping[str, Any] = loaded["state_dict"]
    return state
