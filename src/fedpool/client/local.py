"""FedProx's and Ditto's addition to a local training loop, in one line.

This module imports torch only when needed.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedpool.errors import ClientError

if TYPE_CHECKING:
    import torch


def prox_loss(model: "torch.nn.Module", global_params: Mapping[str, Any], mu: float) -> "torch.Tensor":
    """mu/2 ||w - w_global||^2 over the model's parameters, to add to the loss. For FedProx, and for
    Ditto's personal model.

    Li et al. 2020, "Federated Optimization in Heterogeneous Networks", equation 2
    (https://arxiv.org/abs/1812.06127).

    Args:
        model: the trained model.
        global_params: the received params: name -> tensor or array; entries that aren't parameters
            of the model are ignored.
        mu: weight of the term.

    Raises:
        ClientError: the model has a parameter that the global model lacks.
    """
    import torch

    total = torch.zeros(())
    for name, parameter in model.named_parameters():
        if name not in global_params:
            raise ClientError(f"the global model has no parameter {name!r}: {', '.join(sorted(global_params)[:8])}")
        if parameter.requires_grad:
            anchor = torch.as_tensor(global_params[name]).to(parameter)
            total = total.to(parameter.device) + (parameter - anchor).square().sum()
    return mu / 2 * total
