"""`stop_cond`: a metric compared with a number, such as "accuracy >= 0.8"; and what follows from
it for the key metric.
"""

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
"""Fields of a recipe that decide on the mode."""
Mode = Literal["max", "min"]
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

    @property
    def mode(self) -> Mode | None:
        """Which of two values is nearer to satisfying it: the larger or the smaller one; None
        for `==`, which does not say.
        """
        return "max" if ">" in self.comparison else "min" if "<" in self.comparison else None

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


def choose_mode(metric: str, mode: Mode, condition: StopCondition | None, given: Collection[str]) -> Mode:
    """Whether more or less of the key metric is better: as the user says, else as the condition on
    it says.

    Warns where neither does and the metric's name says otherwise.

    Args:
        metric: the key metric.
        mode: the field `key_metric_mode`.
        given: names of the fields that the user chose.

    Raises:
        RecipeError: user and condition contradict each other.
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
            stacklevel=5,  # who builds the recipe
        )
    return follows or mode


def _sounds_worse(metric: str) -> bool:
    """Whether more of a metric is likely to be worse, going by its name: a loss or an error that
    is not negated.
    """
    return bool(_LESS_IS_BETTER.fullmatch(metric)) and not _NEGATED.match(metric)
