"""Whether received params fit a module, and why not: names and shapes are compared before
anything is loaded.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fedpool.errors import ClientError

_SHOWN = 5


def fitting_params(
    own: Mapping[str, Any], received: Mapping[str, Any], *, strict: bool, same_shapes: bool = False, advice: str = ""
) -> dict[str, Any]:
    """Those received params whose name and shape a module has.

    Args:
        own: name -> tensor of what the module exchanges, of any shape.
        received: name -> tensor.
        strict: whether everything has to fit; otherwise what does not is left out.
        same_shapes: whether, if not strict, a name that both have must have one shape, and there
            must be such a name.
        advice: what else the error says, from a caller who knows more about the module.

    Raises:
        ClientError: something does not fit that has to; the message names it.
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
    """What a module sends back for received params: its own values, and unchanged those that do not
    fit it.

    So a module that is loaded with `strict=False` gives an update of exactly the names and shapes
    that were asked for. A standalone run receives nothing, and sends all that it has.
    """
    if not received:
        return dict(own)
    return {name: own[name] if fits(name, own, value) else value for name, value in received.items()}


def fits(name: str, own: Mapping[str, Any], value: Any) -> bool:
    """Whether a module has a tensor of that name and that value's shape."""
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
    """What to do when the names are the same but for a prefix."""
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
    """The p for which every name of `longer` is p + a name of `shorter`, each once; None when
    there is none.
    """
    wanted, names = set(longer), set(shorter)
    if not names or len(wanted) != len(names):
        return None
    first = min(names)
    candidates = {name.removesuffix(first) for name in wanted if name.endswith(first)} - {""}
    return next((p for p in sorted(candidates) if {p + name for name in names} == wanted), None)
