"""The decorators `train` and `evaluate`, which make a script's functions the steps of a round."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, overload

from fedpool.errors import ClientError
from fedpool.model import FLModel

_scores: dict[str, Any] = {}
"""The scores from `evaluate` in this round, which `train` sends. A process has one client."""


@overload
def train(function: Callable[..., Any]) -> Callable[..., Any]: ...
@overload
def train(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
def train(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Decorate a training function: it gets the received model and returns the `FLModel` to send.

    The scores that a function decorated with `evaluate` returned in this round are sent as its
    metrics. In new scripts, use `receive()` and `send()` instead.
    """

    def decorate(train_function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train_function)
        def round_of(*args: Any, **kwargs: Any) -> Any:
            import fedpool.client

            result = _call_with_model(train_function, args, kwargs)
            if not isinstance(result, FLModel):
                raise ClientError(
                    f"{train_function.__name__}() must return a flare.FLModel, got {type(result).__name__}: "
                    "return flare.FLModel(params=...)"
                )
            if _scores:
                result.metrics = dict(_scores)
                _scores.clear()
            fedpool.client.send(result)
            return result

        return round_of

    return decorate if function is None else decorate(function)


@overload
def evaluate(function: Callable[..., Any]) -> Callable[..., Any]: ...
@overload
def evaluate(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
def evaluate(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Decorate an evaluation function: it gets the received model and returns a dict of metrics or
    one number.

    In a `train` round, call it before the function decorated with `train`, which sends the metrics.
    In other rounds they are sent at once.
    """

    def decorate(evaluate_function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(evaluate_function)
        def round_of(*args: Any, **kwargs: Any) -> Any:
            import fedpool.client

            result = _call_with_model(evaluate_function, args, kwargs)
            if result is None:
                raise ClientError(f"{evaluate_function.__name__}() must return the model's metrics, got None")
            metrics = dict(result) if isinstance(result, Mapping) else {evaluate_function.__name__: result}
            if fedpool.client.is_train():
                _scores.update(metrics)
            else:
                fedpool.client.send(FLModel(metrics=metrics))
            return result

        return round_of

    return decorate if function is None else decorate(function)


def _call_with_model(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function with the received model as its first argument."""
    import fedpool.client

    first = next(iter(inspect.signature(function).parameters), None)
    if first is None:
        raise ClientError(f"{function.__name__}() needs a first parameter for the received model")
    others = {name: value for name, value in kwargs.items() if name != first}
    return function(fedpool.client.receive(), *args[1:], **others)
