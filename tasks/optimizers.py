"""Server optimizers: turn a round's aggregate into a step of the global model.

Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2
(https://arxiv.org/abs/2003.00295). The pseudo-gradient is -delta, where delta is the aggregate
minus the global model. An optimizer is frozen and works element by element. Its slots are the
values that it keeps for each element (see `fedpool.tasks.strategy`).
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch

from fedpool.errors import RecipeError

Tensors = Mapping[str, torch.Tensor]
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Schedule:
    """The server's learning rate: constant, or from a scheduler that is stepped once per round."""

    lr: float
    scheduler: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def at(self, round: int) -> float:
        """The learning rate of a round."""
        if self.scheduler is None:
            return self.lr
        return _scheduled(self.lr, self.scheduler, tuple(sorted(self.arguments.items())), round)

    def check(self) -> None:
        """Raise `RecipeError` if the schedule can't work."""
        if self.scheduler is None:
            return
        try:
            self.at(1)
        except (ImportError, AttributeError, TypeError, ValueError, KeyError) as error:
            raise RecipeError(
                f"server_scheduler {self.scheduler!r} with {dict(self.arguments)} cannot be used ({error}): "
                "give the name of a class of torch.optim.lr_scheduler that steps without a metric, and its arguments"
            ) from None


@lru_cache(maxsize=1024)
def _scheduled(lr: float, scheduler: str, arguments: tuple[tuple[str, Any], ...], round: int) -> float:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    made = getattr(torch.optim.lr_scheduler, scheduler)(optimizer, **dict(arguments))
    for _ in range(round):
        optimizer.step()
        made.step()
    return float(optimizer.param_groups[0]["lr"])


class ServerOptimizer(ABC):
    """One step of the server, element by element."""

    @property
    @abstractmethod
    def slots(self) -> Mapping[str, float]:
        """See `Strategy.slots`."""

    @abstractmethod
    def step(
        self, params: torch.Tensor, delta: torch.Tensor, slots: Tensors, round: int
    ) -> tuple[torch.Tensor, Tensors]:
        """The next parameters and slots.

        Args:
            params: of the global model; flat float64, like all tensors here.
            delta: the aggregate minus `params`.
            slots: as the previous round left them.
            round: number of earlier training rounds.
        """


@dataclass(frozen=True)
class Adaptive(ServerOptimizer):
    """FedAdam, FedYogi, FedAdagrad as in the paper: no bias correction, v starts at tau squared."""

    kind: Literal["adam", "yogi", "adagrad"]
    schedule: Schedule
    beta1: float
    beta2: float
    tau: float

    @property
    def slots(self) -> Mapping[str, float]:
        return {"momentum": 0.0, "second_moment": self.tau**2}

    def step(
        self, params: torch.Tensor, delta: torch.Tensor, slots: Tensors, round: int
    ) -> tuple[torch.Tensor, Tensors]:
        """m <- beta1 m + (1 - beta1) delta; v by its kind; x <- x + lr m / (sqrt(v) + tau)."""
        momentum = self.beta1 * slots["momentum"] + (1 - self.beta1) * delta
        before, square = slots["second_moment"], delta**2
        match self.kind:
            case "adagrad":
                second = before + square
            case "yogi":
                second = before - (1 - self.beta2) * square * (before - square).sign()
            case "adam":
                second = self.beta2 * before + (1 - self.beta2) * square
        after = params + self.schedule.at(round) * momentum / (second.sqrt() + self.tau)
        return after, {"momentum": momentum, "second_moment": second}


@dataclass(frozen=True)
class Momentum(ServerOptimizer):
    """FedAvgM: m <- beta m + delta; x <- x + lr m.

    With Nesterov's look-ahead: x <- x + lr (delta + beta m).

    Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification" (https://arxiv.org/abs/1909.06335).
    """

    schedule: Schedule
    beta: float
    nesterov: bool = False

    @property
    def slots(self) -> Mapping[str, float]:
        return {"momentum": 0.0}

    def step(
        self, params: torch.Tensor, delta: torch.Tensor, slots: Tensors, round: int
    ) -> tuple[torch.Tensor, Tensors]:
        """See the class."""
        momentum = self.beta * slots["momentum"] + delta
        direction = delta + self.beta * momentum if self.nesterov else momentum
        return params + self.schedule.at(round) * direction, {"momentum": momentum}


@dataclass(frozen=True)
class TorchOptimizer(ServerOptimizer):
    """A class of `torch.optim` that works element by element; its state is slots and steps."""

    name: str
    schedule: Schedule
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def slots(self) -> Mapping[str, float]:
        """See `Strategy.slots`. Found with a step that changes nothing."""
        state = self._stepped(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), None, 0)[1]
        found = {}
        for slot, value in state.items():
            if slot == "step" or value is None:
                continue
            if not isinstance(value, torch.Tensor) or value.shape != (2,):
                raise RecipeError(
                    f"server_optimizer torch.optim.{self.name} keeps {slot!r}, which is not one value per element, so it "
                    "cannot run block by block: use another"
                )
            found[slot] = float(value[0])
        return found

    def step(
        self, params: torch.Tensor, delta: torch.Tensor, slots: Tensors, round: int
    ) -> tuple[torch.Tensor, Tensors]:
        """One step of the optimizer with the gradient -delta."""
        after, state = self._stepped(params, delta, {slot: slots[slot].clone() for slot in self.slots}, round)
        return after, {slot: state[slot] for slot in self.slots}

    def check(self) -> None:
        """Raise `RecipeError` if the optimizer doesn't exist or doesn't work element by element."""
        try:
            one, whole, parts = self._tried()
        except RecipeError:
            raise
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise RecipeError(
                f"server_optimizer torch.optim.{self.name} with {dict(self.arguments)} cannot be used ({error}): "
                "give the name of a class of torch.optim, and its arguments without lr, which is server_lr"
            ) from None
        for other in (whole, parts):
            if not torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE):
                raise RecipeError(
                    f"server_optimizer torch.optim.{self.name} with {dict(self.arguments)} does not work element by "
                    "element, or keeps more state than a server does: use another"
                )

    def _tried(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Three steps by torch itself, by this class, and by this class in two parts."""
        generator = torch.Generator().manual_seed(0)
        start, *deltas = torch.randn(4, 8, dtype=torch.float64, generator=generator)
        parameter = torch.nn.Parameter(start.clone())
        optimizer = self._made(parameter, 0)
        for round, delta in enumerate(deltas):
            optimizer.param_groups[0]["lr"] = self.schedule.at(round)
            parameter.grad = -delta
            optimizer.step()

        def run(part: slice) -> torch.Tensor:
            params: torch.Tensor = start[part]
            slots: Tensors = {slot: torch.full_like(params, initial) for slot, initial in self.slots.items()}
            for round, delta in enumerate(deltas):
                params, slots = self.step(params, delta[part], slots, round)
            return params

        by_torch: torch.Tensor = parameter.detach()
        return by_torch, run(slice(0, 8)), torch.cat([run(slice(0, 3)), run(slice(3, 8))])

    def _made(self, parameter: torch.nn.Parameter, round: int) -> torch.optim.Optimizer:
        kind = getattr(torch.optim, self.name)
        optimizer: torch.optim.Optimizer = kind([parameter], lr=self.schedule.at(round), **self.arguments)
        return optimizer

    def _stepped(
        self, params: torch.Tensor, delta: torch.Tensor, slots: Tensors | None, round: int
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        parameter = torch.nn.Parameter(params.clone())
        parameter.grad = -delta
        optimizer = self._made(parameter, round)
        if slots:
            optimizer.state[parameter] = {**slots, "step": torch.tensor(float(round))}
        optimizer.step()
        after: torch.Tensor = parameter.detach()
        return after, dict(optimizer.state[parameter])


def make_optimizer(
    name: str, schedule: Schedule, *, beta1: float, beta2: float, tau: float, arguments: Mapping[str, Any]
) -> ServerOptimizer:
    """The server optimizer of a recipe.

    Raises:
        RecipeError: the optimizer is unknown or can't work.
    """
    schedule.check()
    if name.startswith("torch.optim."):
        optimizer = TorchOptimizer(name.removeprefix("torch.optim."), schedule, arguments)
        with warnings.catch_warnings(action="ignore"):  # torch's warnings on first use aren't about the user's code
            optimizer.check()
        return optimizer
    if arguments:
        raise RecipeError(f"server_optimizer_args={dict(arguments)} are for a class of torch.optim, not for {name!r}")
    match name:
        case "adam" | "yogi" | "adagrad":
            return Adaptive(name, schedule, beta1, beta2, tau)
        case "momentum" | "nesterov":
            return Momentum(schedule, beta1, nesterov=name == "nesterov")
        case _:
            raise RecipeError(
                f"server_optimizer {name!r} is unknown: use adam, yogi, adagrad, momentum, nesterov, or a class such as "
                "torch.optim.AdamW"
            )
