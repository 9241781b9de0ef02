"""SCAFFOLD's single steps, under the names that scripts written for NVFlare call. In new scripts,
use `flare.Scaffold` instead.

The variates travel in `meta`, under `AlgorithmConstants.SCAFFOLD_CTRL_GLOBAL` and
`SCAFFOLD_CTRL_DIFF`. Karimireddy et al. 2020, algorithm 1, option II
(https://arxiv.org/abs/1910.06378). All dicts hold parameter name -> tensor of the parameter's
shape.
"""

from collections.abc import Mapping
from typing import Any

import torch

import fedpool.client
from fedpool.client.scaffold import keep_variate, own_variate
from fedpool.errors import ClientError

_KEPT = "scaffold_helper"

Controls = dict[str, torch.Tensor]


class PTScaffoldHelper:
    """A site's part in SCAFFOLD. Its variate is kept at the site, so it outlives the process, and
    changes only with an update that counted.

    ::

        helper.init(model)  # once
        # in each round, after loading the model
        helper.load_global_controls(input_model.meta["scaffold_c_global"])
        c_global, c_local = helper.get_params()
        helper.model_update(model, lr, c_global, c_local)  # after each step of the optimizer
        helper.terms_update(model, lr, c_global, c_local, received_model)  # after the last one
        meta["scaffold_c_diff"] = helper.get_delta_controls()
    """

    def __init__(self) -> None:
        self._global: Controls = {}
        self._local: Controls = {}
        self._change: Controls | None = None
        self._num_steps = 0

    def init(self, model: torch.nn.Module) -> None:
        """Start with zero variates for the parameters that require a gradient."""
        self._global = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
        self._local = dict(self._global)

    def load_global_controls(self, weights: Mapping[str, Any]) -> None:
        """Take the received variate; parameters that it lacks keep their old values."""
        self._check()
        self._global |= {n: torch.as_tensor(weights[n]).to(old) for n, old in self._global.items() if n in weights}

    def get_params(self) -> tuple[Controls, Controls]:
        """Begin a round: the server's variate c and this site's c_i."""
        self._check()
        self._num_steps, self._change = 0, None
        kept = own_variate(fedpool.client._current(), _KEPT)
        self._local = {name: torch.zeros_like(value) for name, value in self._global.items()}
        self._local |= {n: torch.as_tensor(kept[n]).to(old) for n, old in self._local.items() if n in kept}
        return self._global, self._local

    def model_update(
        self, model: torch.nn.Module, curr_lr: float, c_global_para: Controls, c_local_para: Controls
    ) -> None:
        """Correct a step that the optimizer has taken: w <- w - lr (c - c_i)."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in c_global_para:
                    parameter.sub_(curr_lr * (c_global_para[name] - c_local_para[name]).to(parameter))
        self._num_steps += 1

    def terms_update(
        self,
        model: torch.nn.Module,
        curr_lr: float,
        c_global_para: Controls,
        c_local_para: Controls,
        model_global: torch.nn.Module,
    ) -> None:
        """End a round: c_i <- c_i - c + (x - y) / (steps * lr), where x is the received model and y
        the trained one.

        Without a step, at a site without data, nothing changes and the update has weight 0.

        Raises:
            ClientError: steps were taken, but the learning rate is 0.
        """
        client = fedpool.client._current()
        if self._num_steps == 0:
            client.count_nothing()
            self._change = {name: torch.zeros_like(c) for name, c in c_global_para.items()}
            keep_variate(client, _KEPT, before=c_local_para, after=c_local_para)
            return
        if curr_lr == 0:
            raise ClientError(
                f"SCAFFOLD needs a learning rate above 0: {self._num_steps} steps were taken, the last with 0"
            )
        trained, received = dict(model.named_parameters()), dict(model_global.named_parameters())
        self._change = {
            name: (received[name].detach().to(c) - trained[name].detach().to(c)) / (self._num_steps * curr_lr) - c
            for name, c in c_global_para.items()
        }
        self._local = {name: c_local_para[name] + change for name, change in self._change.items()}
        keep_variate(client, _KEPT, before=c_local_para, after=self._local)

    def get_delta_controls(self) -> Controls:
        """The change of this site's variate in the round.

        Raises:
            ClientError: `terms_update` was not called.
        """
        if self._change is None:
            raise ClientError("call terms_update() after training, then get_delta_controls()")
        return {name: change.cpu() for name, change in self._change.items()}

    def _check(self) -> None:
        if not self._global:
            raise ClientError(
                "call the SCAFFOLD helper's init(model) first, with a model that has trainable parameters"
            )


def get_lr_values(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rate of each group of an optimizer."""
    return [group["lr"] for group in optimizer.param_groups]
