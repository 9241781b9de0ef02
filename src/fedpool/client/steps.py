"""How far a site's local steps go, for FedNova: the norm of the gradients' weights in the update.

This module imports torch only when needed.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedpool.errors import ClientError

if TYPE_CHECKING:
    import torch

_PROBES = (1.0, 2.0, -1.0, 0.0)
_NUM_PROBES = 3
_TOLERANCE = 1e-9
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable", "maximize")
"""Settings of a group that change how a step is computed, or its sign, but not how far it goes."""


class LocalSteps:
    """How far a site's local steps go, for FedNova: plain SGD gives their number, momentum gives
    more, a decaying learning rate less.

    It counts in a hook of the optimizers from when it is made; make one in each round. Send `count`
    as `meta["LOCAL_STEPS"]`. It is the L1 norm of the weights that the gradients have in the
    update, in steps of the initial learning rate (Wang et al. 2020, section 4,
    https://arxiv.org/abs/2007.07481). To compute it, the optimizer's own update is applied to a
    gradient of 1 in every step, so it includes momentum, Nesterov, dampening, weight decay and
    schedules. If groups of parameters differ, it is the mean over all elements.

    Args:
        optimizers: of the local steps: one, or several that train different parameters. They must
            be linear in the gradient.

    Raises:
        ClientError: an optimizer isn't linear. Adam, for example, scales its steps by the
            gradients, so there is no such norm.
    """

    def __init__(self, *optimizers: "torch.optim.Optimizer") -> None:
        self._shadows = [_Shadow(optimizer) for optimizer in optimizers]
        self._hooks = [
            optimizer.register_step_post_hook(lambda *_, shadow=shadow: shadow.step())
            for optimizer, shadow in zip(optimizers, self._shadows, strict=True)
        ]

    @property
    def count(self) -> float:
        """How far the steps have gone so far."""
        parts = [part for shadow in self._shadows for part in shadow.parts()]
        total = sum(num_elements for num_elements, _ in parts)
        mean = sum(num_elements * steps for num_elements, steps in parts) / total if total else 0.0
        return float(f"{mean:.12g}")  # so that ten steps of .1 are 10, without rounding errors

    def close(self) -> float:
        """Stop counting; returns the count."""
        for hook in self._hooks:
            hook.remove()
        return self.count


class _Shadow:
    """A copy of an optimizer that moves one number per group of parameters, always by a gradient
    of 1.
    """

    def __init__(self, optimizer: "torch.optim.Optimizer") -> None:
        self._optimizer = optimizer
        _check_linear(optimizer)
        self._copy = _copied(optimizer, (1.0,))
        for mine, group in zip(self._copy.param_groups, optimizer.param_groups, strict=True):
            # Momentum from earlier rounds isn't a gradient of this one. But if there is any, the
            # optimizer dampens the first gradient.
            if any(
                optimizer.state[p].get("momentum_buffer") is not None for p in group["params"] if p in optimizer.state
            ):
                (number,) = mine["params"]
                self._copy.state[number]["momentum_buffer"] = number.detach().clone()
        self._units = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]

    def step(self) -> None:
        """Follow a step of the optimizer, with its current settings."""
        for index, (mine, group) in enumerate(zip(self._copy.param_groups, self._optimizer.param_groups, strict=True)):
            mine.update(_settings(group))
            self._units[index] = self._units[index] or float(group["lr"])  # a schedule may begin at 0
        self._copy.step()

    def parts(self) -> "list[tuple[int, float]]":
        """For each group: its number of elements, and how far their steps went."""
        found = []
        for mine, group, unit in zip(self._copy.param_groups, self._optimizer.param_groups, self._units, strict=True):
            (number,) = mine["params"]
            num_elements = sum(parameter.numel() for parameter in group["params"] if parameter.requires_grad)
            found.append((num_elements, abs(number.item()) / unit if unit else 0.0))
        return found


def _check_linear(optimizer: "torch.optim.Optimizer") -> None:
    """Refuse an optimizer whose update isn't a weighted sum of its gradients: doubling the
    gradients must double the update.
    """
    import torch

    name = type(optimizer).__name__
    try:
        probe = _copied(optimizer, _PROBES)
        for group, settings in zip(probe.param_groups, optimizer.param_groups, strict=True):
            # With a rate of 0, as at the start of a schedule, or a huge one, the test would be
            # meaningless.
            group["lr"] = 0.01
            for extra in ("weight_decay", "lr_decay"):
                if settings.get(extra):
                    group[extra] = 0.1
        for _ in range(_NUM_PROBES):
            probe.step()
        moved = [group["params"][0].detach() for group in probe.param_groups]
    except Exception as error:  # an optimizer made for other parameters may raise any error
        raise ClientError(f"FedNova cannot tell how far {name} goes: {error}. {_REMEDY}") from error
    wanted = torch.tensor(_PROBES, dtype=torch.float64)
    if not all(torch.allclose(each, each[0] * wanted, rtol=_TOLERANCE, atol=_TOLERANCE) and each[0] for each in moved):
        raise ClientError(
            f"FedNova needs to know how much each gradient counts in the update, and {name} scales its steps by the gradients "
            f"themselves. {_REMEDY}"
        )


_REMEDY = "Use torch.optim.SGD, with any momentum, Nesterov momentum, weight decay and schedules, or another recipe"


def _copied(optimizer: "torch.optim.Optimizer", gradients: tuple[float, ...]) -> Any:
    """A copy of an optimizer with its own parameters, one per group with an element per
    gradient, and no state.
    """
    import torch

    def parameter() -> torch.nn.Parameter:
        made = torch.nn.Parameter(torch.zeros(len(gradients), dtype=torch.float64))
        made.grad = torch.tensor(gradients, dtype=torch.float64)
        return made

    copied = copy.copy(optimizer)  # with hooks of its own
    copied.param_groups = [{**_settings(group), "params": [parameter()]} for group in optimizer.param_groups]
    copied.state = defaultdict(dict)
    return copied


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a group of parameters, for a copy on the CPU."""
    kept = {name: value for name, value in group.items() if name not in ("params", "param_names", "swap_params")}
    off = {name: False for name in _IMPLEMENTATION if name in kept}
    return {**kept, **off, "lr": float(group["lr"])}
