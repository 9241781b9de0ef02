"""The shared part of the trainer integrations: rounds for a trainer with its own fit and score.

A trainer's `fit` and `validate` become calls on an `Exchange`: load the received model, keep its
score, send once per round.
"""

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedpool.client.api import Client, Patched
from fedpool.client.loading import fits, fitting_params, update_of
from fedpool.client.proximal import ProximalTerm, proximal_mu
from fedpool.client.scaffold import Scaffold
from fedpool.client.scopes import Names, Scope, advice, whole
from fedpool.client.steps import LocalSteps
from fedpool.errors import ClientError
from fedpool.model import ALGORITHM, FEDNOVA, LOCAL_STEPS, NUM_STEPS, SCAFFOLD, FLModel


def register(client: Client, trainer: Any, options: Mapping[str, Any]) -> bool:
    """Note that a trainer is patched; returns False if it was already patched with the same
    options.

    A second trainer causes a warning. It may be intended, but optimizers don't carry over from one
    to the other.

    Raises:
        ClientError: this trainer, or another that still exists, was patched with other options; the
            message names them.
    """
    previous = client.patched_trainer
    first = previous.trainer() if previous is not None else None
    if previous is not None and first is not None:
        differing = [
            f"{name}={options[name]!r} after {name}={old!r}"
            for name, old in previous.options.items()
            if name in options and options[name] != old
        ]
        which = "this" if first is trainer else "another"
        if differing:
            raise ClientError(
                f"{which} trainer was already patched with other options: {', '.join(differing)}; call flare.patch() once"
            )
        if first is trainer:
            return False
        warnings.warn(
            "flare.patch() was called for a second trainer: the first one to train answers a round, and optimizers do not carry "
            "over from one trainer to the other; make and patch one trainer, before the loop",
            stacklevel=3,
        )
    client.patched_trainer = Patched(weakref.ref(trainer), dict(options))
    return True


def rows_of(datasets: Sequence[Any]) -> int:
    """The number of rows that a site trains with, in all of its datasets together.

    Raises:
        ClientError: a dataset has no length.
    """
    total = 0
    for dataset in datasets:
        try:
            total += len(dataset)
        except TypeError:
            raise ClientError(
                f"FedNova weights sites by their rows, and a {type(dataset).__name__} does not say how many it has: "
                "give the training data a __len__, or use another recipe"
            ) from None
    return total


class Exchange:
    """One trainer's part in the rounds.

    Args:
        client: the connection to the host.
        strict: whether the received params must have the module's names and shapes.
        same_shapes: if not strict, whether names that both have must have the same shape.
        scope: the module's tensors that are exchanged.
    """

    def __init__(self, client: Client, *, strict: bool, same_shapes: bool = False, scope: Scope = whole) -> None:
        self.client = client
        self._strict, self._same_shapes = strict, same_shapes
        self._scope = scope
        self._metrics: dict[str, Any] = {}
        self._answered = False
        self._control: Scaffold | None = None
        self._steps: LocalSteps | None = None
        self._trained: torch.nn.Module | None = None
        self._kept: dict[str, torch.Tensor] | None = None

    def receive(self) -> FLModel | None:
        """The round's model; waits for it if necessary. None when the job is over."""
        return self.client.receive()

    def receive_to_score(self) -> FLModel | None:
        """The round's model; None if the round's update was already sent or the job is over."""
        return None if self.client.between_rounds else self.client.receive()

    def take_answered(self) -> bool:
        """Whether `scored` has answered the round, so that no training is needed; True once per
        round.
        """
        answered, self._answered = self._answered, False
        return answered and self.client.between_rounds

    def load(self, module: torch.nn.Module) -> None:
        """Load the received params into a module, in place.

        Raises:
            ClientError: they don't fit (`strict`).
        """
        own, names = self._own(module)
        if self.client.task_name == "evaluate" and module is self._trained:
            # After the job's last evaluation a site may be asked for the model that it trained, and
            # the evaluation overwrites it.
            self._kept = {name: value.detach().to("cpu", copy=True) for name, value in own.items()}
        self._trained = None
        if params := self._received():  # a standalone run has none: it continues from the module's own weights
            fitting = fitting_params(
                own, params, strict=self._strict, same_shapes=self._same_shapes, advice=advice(module)
            )
            module.load_state_dict({names[name]: value for name, value in fitting.items()}, strict=False)

    def proximal_term(self, module: torch.nn.Module) -> ProximalTerm:
        """The round's FedProx term, with the strength from the config."""
        own, names = self._own(module)
        anchors = {names[name]: value for name, value in self._received().items() if fits(name, own, value)}
        return ProximalTerm(proximal_mu(self.client.config), module, anchors)

    def begin_steps(self, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Prepare the optimizers for the recipe's algorithm: SCAFFOLD corrects steps, FedNova
        counts them.

        Args:
            module: the trained module, with the received values.
            optimizers: torch's own, not wrappers; none if there is nothing to train with.

        Raises:
            ClientError: SCAFFOLD, and the received names aren't the module's own; or FedNova, and
                it can't tell how far such an optimizer moves the parameters.
        """
        algorithm = self.client.config.get(ALGORITHM)
        if algorithm == SCAFFOLD and (other := next((n for n, o in self._own(module)[1].items() if n != o), None)):
            raise ClientError(
                f"SCAFFOLD needs the module's own names, but {other!r} was received: name the recipe's model as "
                "model.named_parameters() does"
            )
        self._control = Scaffold(module, *optimizers, client=self.client) if algorithm == SCAFFOLD else None
        self._steps = LocalSteps(*optimizers) if algorithm == FEDNOVA else None

    def scored(self, metrics: Mapping[str, Any]) -> None:
        """Take the received model's score: send it at once in an `evaluate` round, else with the
        update.
        """
        self._metrics |= metrics
        if self.client.task_name == "evaluate":
            self._send(FLModel(metrics=self._metrics))
            self._answered = True

    @property
    def weighs_rows(self) -> bool:
        """Whether the site's rows are the weight of an update: FedNova accounts for the steps
        itself.
        """
        return bool(self.client.config.get(ALGORITHM) == FEDNOVA)

    def send_trained(self, module: torch.nn.Module, num_steps: int, num_rows: int = 0) -> None:
        """Send the trained values of a module, with its `__fl_meta__`.

        Args:
            module: the trained module.
            num_steps: optimizer steps of the round, by default the weight of the update.
            num_rows: rows of the training data, the weight of the update if `weighs_rows`.
        """
        self._trained, self._kept = module, None
        weight = num_rows if self.weighs_rows and num_steps else num_steps
        update = self._update(self._own(module)[0], num_steps=weight)
        update.meta |= _meta_of(module)
        if self._control is not None:
            update.extras = self._control.extras()
        if self._steps is not None:
            update.meta[LOCAL_STEPS] = self._steps.close()
        self._control = self._steps = None
        self._send(update)

    def send_untrained(self, module: torch.nn.Module) -> None:
        """Answer a round for which the site has no data: send the received model with weight 0."""
        self.load(module)
        self.begin_steps(module, ())
        self.send_trained(module, 0)

    def send_own(self, best: Mapping[str, Any] | None = None) -> None:
        """Send the site's own model: `best` if given, else the last one that was trained here.

        Raises:
            ClientError: this script has trained no model yet.
        """
        own = best or self._kept
        if own is None and self._trained is not None:
            own = self._own(self._trained)[0]
        if own is None:
            raise ClientError(
                "the site is asked for its own model (submit_model), but this script has trained none yet"
            )
        self._send(self._update(own))

    def _own(self, module: torch.nn.Module) -> tuple[Mapping[str, torch.Tensor], Names]:
        """The tensors that a module exchanges, by their names in transit; and these names mapped to
        the module's own.
        """
        names = self._scope(module, self._received().keys())
        state = module.state_dict()
        return {name: state[own] for name, own in names.items()}, names

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
    """The module's attribute `__fl_meta__`, a dict to send as `meta`. A weight in it overrides
    ours.
    """
    meta = getattr(module, "__fl_meta__", None) or {}
    if not isinstance(meta, dict):
        raise ClientError(f"__fl_meta__ of {type(module).__name__} must be a dict, got {type(meta).__name__}: {meta!r}")
    return meta
