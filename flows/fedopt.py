"""Adaptive federated optimization: the server takes an optimizer step towards the aggregate.

Plain averaging would move all the way to it. delta is the aggregate minus w; initially m = 0 and v
= tau^2; there is no bias correction. The optimizers are:

    adam      m <- beta1 m + (1 - beta1) delta; v <- beta2 v + (1 - beta2) delta^2
              w <- w + lr m / (sqrt(v) + tau)
    yogi      the same with v <- v - (1 - beta2) delta^2 sign(v - delta^2)
    adagrad   the same with v <- v + delta^2
    momentum  m <- beta1 m + delta; w <- w + lr m
    nesterov  m <- beta1 m + delta; w <- w + lr (delta + beta1 m)

The defaults are those of the papers: FedAdagrad has no momentum (beta1 = 0), and FedAvgM, here
`momentum`, has a learning rate of 1 (Hsu et al. 2019, https://arxiv.org/abs/1909.06335).

Paper:
    Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2
    (https://arxiv.org/abs/2003.00295)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, JsonValue, PrivateAttr, model_validator

from fedpool.flows.averaging import Averaging, AveragingRecipe
from fedpool.tasks.optimizers import Schedule, ServerOptimizer, make_optimizer
from fedpool.tasks.strategy import State, Update


@dataclass(frozen=True)
class FedOpt(Averaging):
    """delta <- aggregate - w; w <- optimizer(w, -delta)

    Parameters that aren't floating point, and those that aren't trained, are aggregated.
    """

    optimizer: ServerOptimizer

    @property
    def slots(self) -> Mapping[str, float]:
        return self.optimizer.slots

    def apply(self, state: State, updates: Sequence[Update]) -> State:
        params = {}
        slots: dict[str, dict[str, torch.Tensor]] = {slot: {} for slot in self.slots}
        for name, before in state.params.items():
            aggregate = self.rule.combine(name, state, updates)
            if name in state.averaged:
                params[name] = aggregate
                continue
            here = {slot: values[name] for slot, values in state.slots.items()}
            params[name], after = self.optimizer.step(before, aggregate - before, here, state.round)
            for slot, value in after.items():
                slots[slot][name] = value
        return state.after(params, slots)


class FedOptRecipe(AveragingRecipe):
    """Federated averaging with FedAdam, FedYogi, FedAdagrad, FedAvgM or torch.optim at the server.

    Converges in fewer rounds than plain averaging if sites differ or gradients are sparse, but its
    learning rate needs tuning.

    Client script: examples/algorithms/plain.py
        The same script as for federated averaging: only the server differs.
    """

    server_optimizer: str = Field(
        default="adam",
        description="adam, yogi, adagrad, momentum, nesterov, or a class that works element by element, e.g. torch.optim.AdamW",
    )
    server_lr: float | None = Field(
        default=None,
        description="the server's learning rate; empty: 1 for momentum and nesterov, as in their paper, and 0.1 for the others",
        gt=0,
        allow_inf_nan=False,
    )
    beta1: float | None = Field(
        default=None,
        description="decay of the server's momentum, not for torch.optim; empty: 0 for adagrad, as in its paper, and 0.9 for the "
        "others",
        ge=0,
        lt=1,
    )
    beta2: float = Field(default=0.99, description="decay of the second moment, for adam and yogi", ge=0, lt=1)
    tau: float = Field(
        default=1e-3,
        description="adaptivity of adam, yogi and adagrad: a smaller value is more adaptive",
        gt=0,
        allow_inf_nan=False,
    )
    server_optimizer_args: dict[str, JsonValue] = Field(
        default_factory=dict, description="arguments of a class of torch.optim, without lr"
    )
    server_scheduler: str | None = Field(
        default=None,
        description="class of torch.optim.lr_scheduler for server_lr, stepped once per round, e.g. CosineAnnealingLR",
    )
    server_scheduler_args: dict[str, JsonValue] = Field(default_factory=dict, description="arguments of the scheduler")

    _optimizer: ServerOptimizer = PrivateAttr()

    @model_validator(mode="after")
    def _choose_optimizer(self) -> Self:
        lr, beta1 = self.server_lr, self.beta1
        if lr is None:
            lr = 1.0 if self.server_optimizer in ("momentum", "nesterov") else 0.1
        if beta1 is None:
            beta1 = 0.0 if self.server_optimizer == "adagrad" else 0.9
        schedule = Schedule(lr, self.server_scheduler, self.server_scheduler_args)
        self._optimizer = make_optimizer(
            self.server_optimizer,
            schedule,
            beta1=beta1,
            beta2=self.beta2,
            tau=self.tau,
            arguments=self.server_optimizer_args,
        )
        return self

    def strategy(self, num_sites: int) -> FedOpt:
        return FedOpt(self.rule, self._optimizer)
