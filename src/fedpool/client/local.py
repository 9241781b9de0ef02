"""What some algorithms ask of a local training loop, in a line or two: FedProx and Ditto, FedNova, SCAFFOLD.

This module imports torch only when it is used.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedpool.arrays import describe
from fedpool.errors import ClientError
from fedpool.model import CONTROL
from fedpool.tensors import is_trained

if TYPE_CHECKING:
    import torch

    from fedpool.client.api import Client


def prox_loss(model: "torch.nn.Module", global_params: Mapping[str, Any], mu: float) -> "torch.Tensor":
    """mu/2 ||w - w_global||^2 over the model's parameters, to be added to the loss. Of FedProx, and of Ditto's personal model.

    Li et al. 2020, "Federated Optimization in Heterogeneous Networks", equation 2 (https://arxiv.org/abs/1812.06127).

    Args:
        model: that is trained.
        global_params: as received: name -> tensor or array; what it holds beyond the model's parameters does not matter.
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


class LocalSteps:
    """How far a site's local steps go, for FedNova: with plain SGD their number, with momentum more.

    Counts in a hook of the optimizer's from here on; make one in each round. `count` is what `meta["LOCAL_STEPS"]` wants: the L1
    norm of how much each gradient counts in the update (Wang et al. 2020, section 4, https://arxiv.org/abs/2007.07481).
    """

    def __init__(self, optimizer: "torch.optim.Optimizer") -> None:
        self._momentum = float(optimizer.defaults.get("momentum", 0.0))
        self._reach = 0.0
        self.count = 0.0
        self._hook = optimizer.register_step_post_hook(self._step)

    def _step(self, *_: Any) -> None:
        self._reach = self._momentum * self._reach + 1
        self.count += self._reach

    def close(self) -> float:
        """Stop counting; returns the count."""
        self._hook.remove()
        return self.count


class Scaffold:
    """One round of SCAFFOLD in a plain loop; make it after the received model is loaded, and train as ever.

    Each step of the optimizer is corrected by -lr (c - c_i), and `extras()` is what belongs into the `FLModel` that is sent.
    This site's variate c_i is kept at the site. Karimireddy et al. 2020, algorithm 1, option II
    (https://arxiv.org/abs/1910.06378).

    Args:
        model: that is trained, at the received values.
        optimizers: of the local steps, one or more; the learning rates of their steps are summed, so schedulers may change
            them.
        client: whose round it is; None for this process's, as `flare.init()` made it.

    Raises:
        ClientError: outside a round.
    """

    def __init__(
        self, model: "torch.nn.Module", *optimizers: "torch.optim.Optimizer", client: "Client | None" = None
    ) -> None:
        import torch

        import fedpool.client

        self._client = client or fedpool.client._current()
        received = self._client.receive()
        if received is None:
            raise ClientError("Scaffold() belongs into a round: make it after flare.receive()")
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._rest = {n: v for n, v in model.state_dict().items() if n not in self._parameters}
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
        theirs, ours = received.extras.get(CONTROL, {}), self._client.kept(CONTROL) or {}

        def on(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
            return {
                name: torch.as_tensor(values[name]).to(p) if name in values else torch.zeros_like(p)
                for name, p in self._parameters.items()
            }

        self._theirs, self._ours = on(theirs), on(ours)
        self._rates = {id(p): 0.0 for p in self._parameters.values()}
        self._hooks = [optimizer.register_step_post_hook(self._correct) for optimizer in optimizers]

    def _correct(self, optimizer: "torch.optim.Optimizer", *_: Any) -> None:
        import torch

        names = {id(p): name for name, p in self._parameters.items()}
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if (name := names.get(id(parameter))) is not None:
                        self._rates[id(parameter)] += group["lr"]
                        parameter -= group["lr"] * (self._theirs[name] - self._ours[name])

    def extras(self) -> dict[str, dict[str, Any]]:
        """What this site's variate has changed by, to be sent as `FLModel.extras`; keeps the new one. Once, after training.

        c_i <- c_i - c + (x - y) / (sum of the learning rates).

        Raises:
            ClientError: the optimizer took no step.
        """
        import torch

        for hook in self._hooks:
            hook.remove()
        changes, mine = {}, {}
        for name, parameter in self._parameters.items():
            rate = self._rates[id(parameter)]
            if rate == 0:
                raise ClientError(f"the optimizer took no step of {name!r} since Scaffold() was made: train, then send")
            changes[name] = (self._start[name] - parameter.detach()) / rate - self._theirs[name]
            mine[name] = self._ours[name] + changes[name]
        self._client.keep(CONTROL, mine)
        frozen = {
            name: torch.zeros_like(value)
            for name, value in self._rest.items()
            if is_trained(name, describe(name, value))
        }
        return {CONTROL: changes | frozen}
