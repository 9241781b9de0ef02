"""What the trainer integrations share: the rounds of a trainer that fits and scores by itself, on
top of a `Client`.

A trainer's `fit` and `validate` become calls on an `Exchange`: load what was received, keep its
score, send once a round.
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
    """Note that a trainer is patched; returns False when this one was, with the same options.

    A second trainer is warned about. It may be meant, but optimizers do not go on from one to the
    other.

    Raises:
        ClientError: this trainer, or another that lives, was patched with other options; the
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
                f"{which} trainer was patched already, with other options: {', '.join(differing)}; call flare.patch() once"
            )
        if first is trainer:
            return False
        warnings.warn(
            "flare.patch() was called for a second trainer: whichever trains first answers a round, and optimizers do not go "
            "on from one trainer to the other; make and patch one trainer, ahead of the loop",
            stacklevel=3,
        )
    client.patched_trainer = Patched(weakref.ref(trainer), dict(options))
    return True


def rows_of(datasets: Sequence[Any]) -> int:
    """How many rows a site trains with, all of its datasets together.

    Raises:
        ClientError: a dataset does not say how many it has.
    """
    total = 0
    for dataset in datasets:
        try:
            total += len(dataset)
        except TypeError:
            raise ClientError(
                f"FedNova weighs sites by their rows, and a {type(dataset).__name__} does not say how many it has: "
                "give the training data a __len__, or use another recipe"
            ) from None
    return total


class Exchange:
    """One trainer's part in the rounds.

    Args:
        client: what talks to the host.
        strict: whether names and shapes of the received params must be those of the module.
        same_shapes: whether, if not strict, the shapes of those names that both have must be the
            same.
        scope: which of a module's tensors are exchanged.
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
        """The round's model, waiting for it where there is none yet; None when the job is over."""
        return self.client.receive()

    def receive_to_score(self) -> FLModel | None:
        """The round's model; None when a score would not be that of a received one: it was sent,
        or the job is over.
        """
        return None if self.client.between_rounds else self.client.receive()

    def take_answered(self) -> bool:
        """Whether `scored` has answered the round, so that there is nothing to train; True once
        a round.
        """
        answered, self._answered = self._answered, False
        return answered and self.client.between_rounds

    def load(self, module: torch.nn.Module) -> None:
        """Load the received params into a module, in place.

        Raises:
            ClientError: they do not fit (`strict`).
        """
        own, names = self._own(module)
        if self.client.task_name == "evaluate" and module is self._trained:
            # After the job's last evaluation a site may be asked for the model it trained: this is
            # the last look at it.
            self._kept = {name: value.detach().to("cpu", copy=True) for name, value in own.items()}
        self._trained = None
        if params := self._received():  # a standalone run has none: it goes on from the module's own weights
            fitting = fitting_params(
                own, params, strict=self._strict, same_shapes=self._same_shapes, advice=advice(module)
            )
            module.load_state_dict({names[name]: value for name, value in fitting.items()}, strict=False)

    def proximal_term(self, module: torch.nn.Module) -> ProximalTerm:
        """The round's FedProx term, as the config asks for it."""
        own, names = self._own(module)
        anchors = {names[name]: value for name, value in self._received().items() if fits(name, own, value)}
        return ProximalTerm(proximal_mu(self.client.config), module, anchors)

    def begin_steps(self, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Have the round's steps done as the recipe's algorithm wants them: corrected by SCAFFOLD,
        or counted for FedNova.

        Args:
            module: what is trained, at the received values.
            optimizers: torch's own, not what wraps them; none where there is nothing to train with.

        Raises:
            ClientError: SCAFFOLD, and the received names are not the module's own; FedNova, and it
                cannot be told how far such an optimizer goes.
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
        """The received model's score: sent at once when that is the task, else with the update."""
        self._metrics |= metrics
        if self.client.task_name == "evaluate":
            self._send(FLModel(metrics=self._metrics))
            self._answered = True

    @property
    def weighs_rows(self) -> bool:
        """Whether the weight of an update is to be the site's rows: FedNova makes up for the
        steps itself.
        """
        return bool(self.client.config.get(ALGORITHM) == FEDNOVA)

    def send_trained(self, module: torch.nn.Module, num_steps: int, num_rows: int = 0) -> None:
        """Send what a module was trained to, with its `__fl_meta__`.

        Args:
            num_steps: optimizer steps of the round, the weight of the update, unless
            num_rows: is, where `weighs_rows` says so.
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
        """Answer a round for which the site has no data: with the received model, and weight 0."""
        self.load(module)
        self.begin_steps(module, ())
        self.send_trained(module, 0)

    def send_own(self, best: Mapping[str, Any] | None = None) -> None:
        """Send the site's own model: the best, where one is given, else what was last trained here.

        Raises:
            ClientError: nothing was trained since this script started.
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
        """What a module exchanges, by the names under which it travels; and these names' own
        ones.
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
    """What the module itself wants sent as `meta`: its attribute `__fl_meta__`, a dict. A weight
    in it counts instead of ours.
    """
    meta = getattr(module, "__fl_meta__", None) or {}
    if not isinstance(meta, dict):
        raise ClientError(f"__fl_meta__ of {type(module).__name__} must be a dict, got {type(meta).__name__}: {meta!r}")
    return meta
