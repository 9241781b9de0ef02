"""`stop_cond`: a metric compared with a number, such as "accuracy >= 0.8"."""

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedpool.errors import RecipeError

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_PATTERN = re.compile(r"\s*([^\s<>=!]+)\s*(>=|<=|==|>|<)\s*(\S+)\s*")


@dataclass(frozen=True, slots=True)
class StopCondition:
    """`metric comparison threshold`, true of a round's metrics or not."""

    metric: str
    comparison: str
    threshold: float

    def holds(self, metrics: Mapping[str, float | None]) -> bool:
        """Whether the metrics satisfy it; a metric that is absent or not a number does not."""
        value = metrics.get(self.metric)
        return value is not None and _OPERATORS[self.comparison](value, self.threshold)

    def __str__(self) -> str:
        short = f"{self.threshold:g}"
        return f"{self.metric} {self.comparison} {short if float(short) == self.threshold else repr(self.threshold)}"


def parse_condition(text: str) -> StopCondition:
    """Parse "accuracy >= 0.8", with or without spaces.

    Raises:
        RecipeError: it is not a metric, one of >= <= == > <, and a finite number.
    """
    match = _PATTERN.fullmatch(text)
    try:
        threshold = float(match[3]) if match else math.nan
    except ValueError:
        threshold = math.nan
    if match is None or not math.isfinite(threshold):
        raise RecipeError(f'stop_cond {text!r} is not of the form "metric >= number" (with one of >= <= == > <)')
    return StopCondition(match[1], match[2], threshold)
