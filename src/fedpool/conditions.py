"""`stop_cond`: a metric compared with a number, such as "accuracy >= 0.8"."""

import math
import operator
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from fedpool.errors import RecipeError

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_LESS_IS_BETTER = re.compile(r"(?:.*[\W_])?(?:loss|error|err|mse|rmse|mae|nll|perplexity|ppl)", re.IGNORECASE)
_NEGATED = re.compile(r"(?:neg|negative|minus)(?:[\W_]|$)|-", re.IGNORECASE)
MODE_FIELDS = frozenset({"key_metric", "key_metric_mode", "stop_cond"})
"""The recipe fields that determine the mode."""
Mode = Literal["max", "min"]
_PATTERN = re.compile(r"\s*([^\s<>=!]+)\s*(>=|<=|==|>|<)\s*(\S+)\s*")


@dataclass(frozen=True, slots=True)
class StopCondition:
    """`metric comparison threshold`, which holds for a round's metrics or doesn't."""

    metric: str
    comparison: str
    threshold: float

    def holds(self, metrics: Mapping[str, float | None]) -> bool:
        """Whether the metrics satisfy it. A metric that is missing or not a number doesn't."""
        value = metrics.get(self.metric)
        return value is not None and _OPERATORS[self.comparison](value, self.threshold)

    @property
    def mode(self) -> Mode | None:
        """Whether larger or smaller values are better; None for `==`, which doesn't say."""
        return "max" if ">" in self.comparison else "min" if "<" in self.comparison else None

    def __str__(self) -> str:
        short = f"{self.threshold:g}"
        return f"{self.metric} {self.comparison} {short if float(short) == self.threshold else repr(self.threshold)}"


def parse_condition(text: str) -> StopCondition:
    """Parse "accuracy >= 0.8", with or without spaces.

    Raises:
        RecipeError: the text isn't a metric, one of >= <= == > <, and a finite number.
    """
    match = _PATTERN.fullmatch(text)
    try:
        threshold = float(match[3]) if match else math.nan
    except ValueError:
        threshold = math.nan
    if match is None or not math.isfinite(threshold):
        raise RecipeError(f'stop_cond {text!r} is not of the form "metric >= number" (with one of >= <= == > <)')
    return StopCondition(match[1], match[2], threshold)


def choose_mode(metric: str, mode: Mode, condition: StopCondition | None, given: Collection[str]) -> Mode:
    """Whether a higher or a lower key metric is better: the user's choice, else the condition's.

    Warns if neither says and the metric's name suggests that lower is better.

    Args:
        metric: the key metric.
        mode: the field `key_metric_mode`.
        given: names of the fields that the user set.

    Raises:
        RecipeError: the user's choice and the condition contradict each other.
    """
    follows = condition.mode if condition and condition.metric == metric else None
    if "key_metric_mode" in given:
        if follows not in (None, mode):
            raise RecipeError(
                f"key_metric_mode={mode!r} contradicts stop_cond={str(condition)!r}: "
                f"give key_metric_mode={follows!r}, or leave it out"
            )
    elif follows is None and "key_metric" in given and _sounds_worse(metric):
        warnings.warn(
            f"key_metric={metric!r} without key_metric_mode: the highest {metric} counts as the best; "
            'give key_metric_mode="min" if less of it is better, or "max" to confirm',
            stacklevel=5,  # the line that builds the recipe
        )
    return follows or mode


def _sounds_worse(metric: str) -> bool:
    """Whether the name suggests that lower is better: a loss or an error that isn't negated."""
    return bool(_LESS_IS_BETTER.fullmatch(metric)) and not _NEGATED.match(metric)
