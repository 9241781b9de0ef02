"""What the trainer integrations share: the rounds of a trainer that fits and scores by itself, on top of a `Client`.

A trainer's `fit` and `validate` become calls on an `Exchange`: load what was received, keep its score, send once a round.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fedpool.client.api import Client
from fedpool.client.loading import fits, fitting_params, update_of
from fedpool.client.local import LocalSteps, Scaffold
from fedpool.client.proximal import ProximalTerm, proximal_mu
from fedpool.errors import ClientError
from fedpool.model import ALGORITHM, FEDNOVA, LOCAL_STEPS, NUM_STEPS, SCAFFOLD, FLModel

Scope = Callable[[torch.nn.Module], Mapping[str, torch.Tensor]]


def all_params(module: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """The state dict: parameters and persistent buffers."""
    state: dict[str, torch.Tensor] = module.state_dict()
    return state


def trainable_params(module: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """Only the parameters that require a gradient: the adapters of a PEFT model."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def same_options(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """See that a trainer that is patched again is patched in the same way.

    Raises:
        ClientError: an option differs; the message names it and both values.
    """
    differing = [
        f"{name}={second[name]!r} after {name}={first[name]!r}" for name in first if first[name] != second[name]
    ]
    if differing:
        raise ClientError(
            f"this trainer was patched already, with other options: {', '.join(differing)}; call flare.patch() once"
        )


class Exchange:
    """One trainer's part in the rounds.

    Args:
        client: what talks to the host.
        strict: whether names and shapes of the received params must be those of the module.
        same_shapes: whether, if not strict, the shapes of those names that both have must be the same.
        scope: which of a module's tensors are exchanged.
    """

    def __init__(self, client: Client, *, strict: bool, same_shapes: bool = False, scope: Scope = all_params) -> None:
        self.client = client
        client.patched = True
        self._strict, self._same_shapes = strict, same_shapes
        self._scope = scope
        self._metrics: dict[str, Any] = {}
        self._answered = False
        self._control: Scaffold | None = None
        self._steps: LocalSteps | None = None
        self._trained: torch.nn.Module | None = None
        self._kept: dict[str, torch.Tensor] | None = None

    def receive(self) -> FLModel | None:
        """The round's model, waiting for it where there is none yet; None when the job is over."""
        return self.client.receive()

    def receive_to_score(self) -> FLModel | None:
        """The round's model; None when a score would not be that of a received one: it was sent, or the job is over."""
        return None if self.client.between_rounds else self.client.receive()

    def take_answered(self) -> bool:
        """Whether `scored` has answered the round, so that there is nothing to train; True once a round."""
        answered, self._answered = self._answered, False
        return answered and self.client.between_rounds

    def load(self, module: torch.nn.Module) -> None:
        """Load the received params into a module, in place.

        Raises:
            ClientError: they do not fit (`strict`).
        """
        if self.client.task_name == "evaluate" and module is self._trained:
            # After the job's last evaluation a site may be asked for the model it trained: this is the last look at it.
            self._kept = {name: value.detach().to("cpu", copy=True) for name, value in self._scope(module).items()}
        self._trained = None
        if params := self._received():  # a standalone run has none: it goes on from the module's own weights
            own = self._scope(module)
            fitting = fitting_params(own, params, strict=self._strict, same_shapes=self._same_shapes)
            module.load_state_dict(fitting, strict=False)

    def proximal_term(self, module: torch.nn.Module) -> ProximalTerm:
        """The round's FedProx term, as the config asks for it."""
        own = self._scope(module)
        anchors = {name: value for name, value in self._received().items() if fits(name, own, value)}
        return ProximalTerm(proximal_mu(self.client.config), module, anchors)

    def begin_steps(self, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Have the round's steps done as the recipe's algorithm wants them: corrected by SCAFFOLD, or counted for FedNova.

        Args:
            module: what is trained, at the received values.
            optimizers: torch's own, not what wraps them; FedNova counts the steps of the first.
        """
        algorithm = self.client.config.get(ALGORITHM)
        self._control = Scaffold(module, *optimizers, client=self.client) if algorithm == SCAFFOLD else None
        self._steps = LocalSteps(optimizers[0]) if algorithm == FEDNOVA else None

    def scored(self, metrics: Mapping[str, Any]) -> None:
        """The received model's score: sent at once when that is the task, else with the update."""
        self._metrics |= metrics
        if self.client.task_name == "evaluate":
            self._send(FLModel(metrics=self._metrics))
            self._answered = True

    def send_trained(self, module: torch.nn.Module, num_steps: int) -> None:
        """Send what a module was trained to, with its `__fl_meta__`.

        Args:
            num_steps: optimizer steps of the round, the weight of the update.
        """
        self._trained, self._kept = module, None
        update = self._update(self._scope(module), num_steps=num_steps)
        update.meta |= _meta_of(module)
        if self._control is not None:
            update.extras = self._control.extras()
        if self._steps is not None:
            update.meta[LOCAL_STEPS] = self._steps.close()
        self._control = self._steps = None
        self._send(update)

    def send_own(self, best: Mapping[str, Any] | None = None) -> None:
        """Send the site's own model: the best, where one is given, else what was last trained here.

        Raises:
            ClientError: nothing was trained since this script started.
        """
        own = best or self._kept
        if own is None and self._trained is not None:
            own = self._scope(self._trained)
        if own is None:
            raise ClientError(
                "the site is asked for its own model (submit_model), but this script has trained none yet"
            )
        self._send(self._update(own))

    def _received(self) -> Mapping[str, Any]:
        model = self.client.receive()
        assert model is not None and model.params is not None
        return model.params

    def _update(self, own: Mapping[str, Any], num_steps: int | None = None) -> FLModel:
        params = update_of(own, self._received())
        return FLModel(
            params=params, metrics=self._metrics or None, meta={} if num_steps is None else {NUM_STEPS: num_steps}
        )

    def _send(self, model: FLModel) -> None:
        self.client.send(model)
        self._metrics = {}


def _meta_of(module: torch.nn.Module) -> dict[str, Any]:
    """What the module itself wants sent as `meta`: its attribute `__fl_meta__`, a dict. A weight in it counts instead of ours."""
    meta = getattr(module, "__fl_meta__", None) or {}
    if not isinstance(meta, dict):
        raise ClientError(f"__fl_meta__ of {type(module).__name__} must be a dict, got {type(meta).__name__}: {meta!r}")
    return meta
