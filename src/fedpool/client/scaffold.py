"""SCAFFOLD in a plain loop, in two lines.

This module imports torch only when needed.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedpool.arrays import describe
from fedpool.errors import ClientError
from fedpool.model import CONTROL
from fedpool.tensors import beside, is_trained

if TYPE_CHECKING:
    import torch

    from fedpool.client.api import Client

_BEFORE = "before"
"""Group, in the kept file, of the variate that the round started from."""


class Scaffold:
    """One round of SCAFFOLD in a plain loop. Make it after you load the received model, then train
    as usual.

    It corrects each step of the optimizer by -lr (c - c_i); send its `extras()` in the `FLModel`.
    This site's variate c_i is kept at the site, and changes only with an update that counted: a
    late or rejected update, or one with weight 0, leaves it as it was. Karimireddy et al. 2020,
    algorithm 1, option II (https://arxiv.org/abs/1910.06378).

    Args:
        model: the trained model, with the received values.
        optimizers: of the local steps, one or more; the learning rates of their steps are summed,
            so schedulers may change them.
        client: of this round; None for this process's, as made by `flare.init()`.

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
            raise ClientError("Scaffold() was made outside a round: make it after flare.receive()")
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._rest = {n: v for n, v in model.state_dict().items() if n not in self._parameters}
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
        theirs, ours = received.extras.get(CONTROL, {}), own_variate(self._client, CONTROL)

        def on(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
            return {
                name: torch.as_tensor(values[name]).to(p) if name in values else torch.zeros_like(p)
                for name, p in self._parameters.items()
            }

        self._theirs, self._ours = on(theirs), on(ours)
        self._rates = {id(p): 0.0 for p in self._parameters.values()}
        self._num_steps = 0
        self._hooks = [optimizer.register_step_post_hook(self._correct) for optimizer in optimizers]

    def _correct(self, optimizer: "torch.optim.Optimizer", *_: Any) -> None:
        import torch

        self._num_steps += 1
        names = {id(p): name for name, p in self._parameters.items()}
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if (name := names.get(id(parameter))) is not None:
                        self._rates[id(parameter)] += group["lr"]
                        parameter -= group["lr"] * (self._theirs[name] - self._ours[name])

    def extras(self) -> dict[str, dict[str, Any]]:
        """The change of this site's variate, to send as `FLModel.extras`. Also keeps the new
        variate. Call it once, after training.

        c_i <- c_i - c + (x - y) / (sum of the learning rates). Without a step, at a site without
        data, nothing changes and the update has weight 0.

        Raises:
            ClientError: a parameter has changed, but the optimizers took no step of it.
        """
        import torch

        for hook in self._hooks:
            hook.remove()
        changes, mine = {}, {}
        for name, parameter in self._parameters.items():
            rate = self._rates[id(parameter)]
            if rate:
                changes[name] = (self._start[name] - parameter.detach()) / rate - self._theirs[name]
            elif torch.equal(self._start[name], parameter.detach()):
                changes[name] = torch.zeros_like(self._start[name])
            else:
                raise ClientError(
                    f"{name!r} has changed, but no optimizer given to Scaffold() has updated it since then: give Scaffold() the "
                    "optimizers that train the model, after you load the received model"
                )
            mine[name] = self._ours[name] + changes[name]
        if self._num_steps == 0:
            self._client.count_nothing()
        keep_variate(self._client, CONTROL, before=self._ours, after=mine)
        frozen = {
            name: torch.zeros_like(value)
            for name, value in self._rest.items()
            if is_trained(name, describe(name, value))
        }
        return {CONTROL: changes | frozen}


def own_variate(client: "Client", name: str) -> Mapping[str, Any]:
    """This site's variate after its last update that counted: parameter name -> tensor; empty
    before the first.
    """
    import torch

    kept, scale = client.kept_with_update(name)
    if kept is None:
        return {}
    after = {parameter: value for parameter, value in kept.items() if beside(_BEFORE, parameter) in kept}
    if scale == 1.0 or not after:  # earlier versions kept only the variate after the round
        return after or kept
    # The server has scaled down the update, and with it the variate's change.
    pairs = ((n, torch.as_tensor(kept[beside(_BEFORE, n)]), torch.as_tensor(value)) for n, value in after.items())
    return {parameter: before + scale * (value - before) for parameter, before, value in pairs}


def keep_variate(client: "Client", name: str, *, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Keep the variate for both cases: `after` if this round's update counts, `before` if not."""
    client.keep_with_update(name, {**after, **{beside(_BEFORE, n): value for n, value in before.items()}})
