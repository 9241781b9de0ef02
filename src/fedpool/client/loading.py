"""Whether received params fit a module, and why not. Compares names and shapes before loading."""

from collections.abc import Iterable, Mapping
from typing import Any

from fedpool.errors import ClientError

_SHOWN = 5


def fitting_params(
    own: Mapping[str, Any], received: Mapping[str, Any], *, strict: bool, same_shapes: bool = False, advice: str = ""
) -> dict[str, Any]:
    """The received params that have the name and shape of one of the module's tensors.

    Args:
        own: name -> tensor that the module exchanges, of any shape.
        received: name -> tensor.
        strict: whether everything must fit; otherwise params that don't fit are left out.
        same_shapes: if not strict, whether names that both have must have the same shape, and at
            least one such name must exist.
        advice: appended to the error, from a caller who knows more about the module.

    Raises:
        ClientError: something that must fit doesn't; the message names it.
    """
    fitting = {name: value for name, value in received.items() if fits(name, own, value)}
    in_both = len(own.keys() & received.keys())
    if (strict and not len(fitting) == len(received) == len(own)) or (
        same_shapes and (not fitting or len(fitting) < in_both)
    ):
        hint = advice or _hint(own, received)
        raise ClientError(f"the received model does not fit this one: {_problems(own, received)}{hint}")
    return fitting


def update_of(own: Mapping[str, Any], received: Mapping[str, Any]) -> dict[str, Any]:
    """A module's answer to received params: its own values, and the received ones where they don't
    fit.

    So a module that is loaded with `strict=False` sends exactly the names and shapes that it
    received. A standalone run receives nothing, and sends everything that it has.
    """
    if not received:
        return dict(own)
    return {name: own[name] if fits(name, own, value) else value for name, value in received.items()}


def fits(name: str, own: Mapping[str, Any], value: Any) -> bool:
    """Whether a module has a tensor of this name and this value's shape."""
    return name in own and tuple(own[name].shape) == tuple(value.shape)


def _problems(own: Mapping[str, Any], received: Mapping[str, Any]) -> str:
    problems = [
        f"{name}: expected {tuple(own[name].shape)}, got {tuple(received[name].shape)}"
        for name in sorted(own.keys() & received.keys())
        if not fits(name, own, received[name])
    ]
    problems += [f"{name} is missing" for name in sorted(own.keys() - received.keys())]
    problems += [f"{name} is not in this model" for name in sorted(received.keys() - own.keys())]
    more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def _hint(own: Iterable[str], received: Iterable[str]) -> str:
    """The remedy if the names differ only by a prefix."""
    if prefix := _prefix(own, received):
        return (
            f". Every name has the prefix {prefix!r} in this model and lacks it in the received one: give the recipe "
            "the state dict of the model as it is here"
        )
    if prefix := _prefix(received, own):
        return (
            f". Every name has the prefix {prefix!r} in the received model and lacks it in this one: give the recipe "
            "the state dict of the model as it is here"
        )
    return ""


def _prefix(longer: Iterable[str], shorter: Iterable[str]) -> str | None:
    """The p for which `longer` is p + each name of `shorter`; None if there is none."""
    wanted, names = set(longer), set(shorter)
    if not names or len(wanted) != len(names):
        return None
    first = min(names)
    candidates = {name.removesuffix(first) for name in wanted if name.endswith(first)} - {""}
    return next((p for p in sorted(candidates) if {p + name for name in names} == wanted), None)
