"""The methods of a patched transformers `Trainer`, and the state kept between rounds."""

import inspect
import math
from collections.abc import Callable, Mapping, Sized
from copy import deepcopy
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from fedpool.client.api import Client
from fedpool.client.exchange import Exchange, rows_of
from fedpool.client.proximal import ProximalTerm
from fedpool.errors import ClientError

_TIMINGS = ("_runtime", "_per_second", "_model_preparation_time")
"""Endings of the names of the timings that `evaluate` returns with the model's scores."""


class Rounds:
    """The methods of a patched trainer."""

    def __init__(self, trainer: Any, exchange: Exchange, restore_state: bool) -> None:
        self._trainer = trainer
        self._exchange = exchange
        self._train: Callable[..., TrainOutput] = trainer.train
        self._evaluate: Callable[..., dict[str, float]] = trainer.evaluate
        self._create_scheduler: Callable[..., LRScheduler] = trainer.create_scheduler
        self._train_signature = inspect.signature(trainer.train)
        self._scheduler: LRScheduler | None = None
        self._fresh = None if restore_state else _FreshState(trainer)
        self._busy = False  # the trainer evaluates within train(), and calls evaluate() for each of its datasets

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See `huggingface.patch`. Within `train`, after the round was sent and after the job, the
        trainer's own.
        """
        if self._busy or self._exchange.receive_to_score() is None:
            return self._evaluate(*args, **kwargs)
        if self._exchange.client.task_name == "submit_model":
            return {}
        return self._score(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """See `huggingface.patch`. After the job, the trainer's own. Returns 0 steps if nothing is
        trained.
        """
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
        """The job's one schedule: transformers drops the one that it made in each `train`."""
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
        """The FedProx term of the current training; None outside a round."""
        return self._exchange.proximal_term(user_model(self._trainer)) if self._busy else None

    def begin_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """See `Exchange.begin_steps`; does nothing outside a round."""
        if self._busy and self._exchange.client.task_name == "train":
            self._exchange.begin_steps(user_model(self._trainer), [optimizer])

    def _train_and_send(self, *args: Any, **kwargs: Any) -> TrainOutput:
        rows = self._trainer.train_dataset
        num_rows = rows_of([rows]) if self._exchange.weighs_rows and rows is not None else 0
        if isinstance(rows, Sized) and len(rows) == 0:  # transformers would raise
            self._exchange.send_untrained(user_model(self._trainer))
            return TrainOutput(0, 0.0, {})
        self._exchange.load(user_model(self._trainer))
        if self._fresh is not None:
            self._fresh.restore(self._trainer)
        self._busy = True
        try:
            output = self._train(*args, **kwargs)
        finally:
            self._busy = False
        self._exchange.send_trained(user_model(self._trainer), self._trainer.state.global_step, num_rows)
        return output

    def _score(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._exchange.load(user_model(self._trainer))
        self._busy = True
        try:
            with torch.random.fork_rng(devices=[]):
                metrics = self._evaluate(*args, **kwargs)
        finally:
            self._busy = False
        scores = {name: value for name, value in metrics.items() if name != "epoch" and not name.endswith(_TIMINGS)}
        self._exchange.scored(scores)
        return metrics


class Hooks(TrainerCallback):
    """The trainer's callbacks: they add the FedProx term to the optimizer for one `train`."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._remove()  # left by a train() that raised
        self._rounds.begin_steps(_unwrapped(optimizer))
        term = self._rounds.proximal_term()
        if term is None:
            return
        # In the step itself, when accelerate has unscaled the gradients. A fused optimizer unscales
        # in its own step, and has the scaler's factor by then.
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


class Streamed(TrainerCallback):
    """Sends the values that the trainer logs, with their step, if they are finite numbers."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, value in (logs or {}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._client.log(name, value, global_step=state.global_step)


class _FreshState:
    """The state that each round starts from if no state is kept."""

    def __init__(self, trainer: Any) -> None:
        self._optimizer = _state_of(trainer.optimizer)
        self._scheduler = _state_of(trainer.lr_scheduler)
        self._scaler = _state_of(getattr(trainer.accelerator, "scaler", None))

    def restore(self, trainer: Any) -> None:
        """Restore the state. The trainer makes anew the parts that it made itself."""
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
    """torch's own optimizer, without accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _state_of(stateful: Any) -> Mapping[str, Any] | None:
    return None if stateful is None else deepcopy(stateful.state_dict())


def user_model(trainer: Any) -> torch.nn.Module:
    """The user's model, without wrappers."""
    model: torch.nn.Module = trainer.model
    return model
