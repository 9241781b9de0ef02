"""How far a site's local steps go, for FedNova: the norm of what each gradient counts for in the
update.

This module imports torch only when it is used.
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
"""Settings of a group that bear on how a step is computed, or on its sign, and not on how far it
goes.
"""


class LocalSteps:
    """How far a site's local steps go, for FedNova: with plain SGD their number, with momentum
    more, with a falling rate less.

    Counts in a hook of the optimizers' from here on; make one in each round. `count` is what
    `meta["LOCAL_STEPS"]` wants: the L1 norm of how much each gradient counts in the update, in
    steps of the initial learning rate (Wang et al. 2020, section 4,
    https://arxiv.org/abs/2007.07481). It is what a gradient of 1 in every step comes to by the
    optimizer's own update: momentum, Nesterov's, dampening, weight decay and schedules included.
    Where groups of parameters differ, it is the mean of all elements.

    Args:
        optimizers: of the local steps; one, or more that train different parameters. They have to
            be linear in the gradient.

    Raises:
        ClientError: an optimizer is not, such as Adam, which scales its steps by the gradients:
            then no such norm exists.
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
        return float(f"{mean:.12g}")  # ten steps of .1 are 10, and not what they add up to

    def close(self) -> float:
        """Stop counting; returns the count."""
        for hook in self._hooks:
            hook.remove()
        return self.count


class _Shadow:
    """A copy of an optimizer that moves one number for each group of parameters, always by a
    gradient of 1.
    """

    def __init__(self, optimizer: "torch.optim.Optimizer") -> None:
        self._optimizer = optimizer
        _check_linear(optimizer)
        self._copy = _copied(optimizer, (1.0,))
        for mine, group in zip(self._copy.param_groups, optimizer.param_groups, strict=True):
            # A momentum of earlier rounds is no gradient of this one's, but while there is one the
            # first gradient is dampened.
            if any(
                optimizer.state[p].get("momentum_buffer") is not None for p in group["params"] if p in optimizer.state
            ):
                (number,) = mine["params"]
                self._copy.state[number]["momentum_buffer"] = number.detach().clone()
        self._units = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]

    def step(self) -> None:
        """Follow a step that the optimizer has taken, by its settings of now."""
        for index, (mine, group) in enumerate(zip(self._copy.param_groups, self._optimizer.param_groups, strict=True)):
            mine.update(_settings(group))
            self._units[index] = self._units[index] or float(group["lr"])  # a schedule may begin at 0
        self._copy.step()

    def parts(self) -> "list[tuple[int, float]]":
        """Of each group: elements, and how far their steps went."""
        found = []
        for mine, group, unit in zip(self._copy.param_groups, self._optimizer.param_groups, self._units, strict=True):
            (number,) = mine["params"]
            num_elements = sum(parameter.numel() for parameter in group["params"] if parameter.requires_grad)
            found.append((num_elements, abs(number.item()) / unit if unit else 0.0))
        return found


def _check_linear(optimizer: "torch.optim.Optimizer") -> None:
    """Refuse an optimizer whose update is no weighted sum of its gradients: twice the gradients
    must go twice as far.
    """
    import torch

    name = type(optimizer).__name__
    try:
        probe = _copied(optimizer, _PROBES)
        for group, settings in zip(probe.param_groups, optimizer.param_groups, strict=True):
            # A rate of 0, as at the beginning of a schedule, would tell nothing; so would one that
            # moves too far.
            group["lr"] = 0.01
            for extra in ("weight_decay", "lr_decay"):
                if settings.get(extra):
                    group[extra] = 0.1
        for _ in range(_NUM_PROBES):
            probe.step()
        moved = [group["params"][0].detach() for group in probe.param_groups]
    except Exception as error:  # whatever an optimizer that was made for other parameters raises
        raise ClientError(f"FedNova cannot tell how far {name} goes: {error}. {_REMEDY}") from error
    wanted = torch.tensor(_PROBES, dtype=torch.float64)
    if not all(torch.allclose(each, each[0] * wanted, rtol=_TOLERANCE, atol=_TOLERANCE) and each[0] for each in moved):
        raise ClientError(
            f"FedNova needs to know how much each gradient counts in the update, and {name} scales its steps by the gradients "
            f"themselves. {_REMEDY}"
        )


_REMEDY = "Use torch.optim.SGD, with momentum, Nesterov's, weight decay and schedules as you like, or another recipe"


def _copied(optimizer: "torch.optim.Optimizer", gradients: tuple[float, ...]) -> Any:
    """A copy of an optimizer with parameters of its own, as many numbers as gradients in each
    group, and no state.
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
    """The settings of a group of parameters, as a copy on the CPU wants them."""
    kept = {name: value for name, value in group.items() if name not in ("params", "param_names", "swap_params")}
    off = {name: False for name in _IMPLEMENTATION if name in kept}
    return {**kept, **off, "lr": float(group["lr"])}
