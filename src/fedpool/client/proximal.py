"""The proximal term of FedProx for trainers with their own training loop.

Adds mu/2 * ||w - w_global||^2 to the loss through its gradient, mu * (w - w_global). Li et al.,
Federated Optimization in Heterogeneous Networks, https://arxiv.org/abs/1812.06127, equation 2.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from fedpool.errors import ClientError
from fedpool.model import FEDPROX_MU


def add_proximal_gradient(parameter: torch.Tensor, anchor: torch.Tensor, mu: float | torch.Tensor) -> None:
    """grad += mu * (w - w_global). A parameter without a gradient gets one, as from a term of the
    loss.

    Args:
        parameter: w, of any shape.
        anchor: w_global, of the same shape, dtype and device.
        mu: the strength.
    """
    pull = (parameter.detach() - anchor).mul_(mu)
    parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)


class ProximalTerm:
    """Pulls a module's parameters towards the received model for one round.

    Leaves parameters alone that the received model lacks or that require no gradient.

    Args:
        mu: the strength; 0 does nothing.
        module: the trained module.
        received: name -> tensor on any device; read when a parameter is first pulled.
    """

    def __init__(self, mu: float, module: torch.nn.Module, received: Mapping[str, Any]) -> None:
        self._mu = mu
        self._received: dict[torch.Tensor, Any] = {
            parameter: received[name] for name, parameter in module.named_parameters() if mu and name in received
        }
        self._anchors: dict[torch.Tensor, torch.Tensor] = {}

    def add_gradients(self, optimizer: torch.optim.Optimizer, scale: float | torch.Tensor = 1.0) -> None:
        """Add the term's gradient to the gradients of an optimizer that is about to step.

        Args:
            optimizer: torch's own.
            scale: the factor of a grad scaler in the existing gradients; 1 if they are unscaled.
        """
        for group in optimizer.param_groups if self._received else ():
            for parameter in group["params"]:
                if parameter.requires_grad and parameter in self._received:
                    add_proximal_gradient(parameter, self._anchor(parameter), self._mu * scale)

    def _anchor(self, parameter: torch.Tensor) -> torch.Tensor:
        if parameter not in self._anchors:
            received = torch.as_tensor(self._received[parameter])
            self._anchors[parameter] = received.to(device=parameter.device, dtype=parameter.dtype)
        return self._anchors[parameter]


def proximal_mu(config: Mapping[str, Any]) -> float:
    """The strength in a config; 0 if it has none.

    Raises:
        ClientError: it isn't a finite number from 0.
    """
    mu = config.get(FEDPROX_MU, 0.0)
    if isinstance(mu, bool) or not isinstance(mu, int | float) or not math.isfinite(mu) or mu < 0:
        raise ClientError(f"{FEDPROX_MU} in the config must be a finite number from 0, got {mu!r}")
    return float(mu)


class PTFedProxLoss(torch.nn.Module):
    """FedProx's term as a module that is called with two models, for scripts written for NVFlare.

    Args:
        mu: the strength, from 0.
    """

    def __init__(self, mu: float = 0.01) -> None:
        super().__init__()
        if mu < 0:
            raise ClientError(f"mu must be a number from 0, got {mu!r}")
        self.mu = mu

    def forward(self, model: torch.nn.Module, received: torch.nn.Module) -> torch.Tensor:
        """mu/2 * ||w - w_global||^2, to add to the loss.

        Args:
            model: the trained model.
            received: a copy of it with the received values and the same parameters.
        """
        pairs = zip(model.parameters(), received.parameters(), strict=True)
        return self.mu / 2 * torch.stack([(own - anchor).square().sum() for own, anchor in pairs]).sum()
