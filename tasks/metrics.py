"""Aggregates the sites' metrics, and derives the best model and early stopping from them."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

Metrics = Mapping[str, float | None]


def mean_metrics(reports: Iterable[tuple[float, Metrics]]) -> dict[str, float]:
    """Weighted mean of each metric over the sites that report it.

    Args:
        reports: (weight from 0, metrics) pairs; a metric that is None was not finite and is left
            out.

    If all sites that report a metric have weight 0, the result is their unweighted mean.
    """
    values: dict[str, list[tuple[float, float]]] = {}
    for weight, metrics in reports:
        for name, value in metrics.items():
            if value is not None:
                values.setdefault(name, []).append((weight, value))
    return {name: _mean(pairs) for name, pairs in sorted(values.items())}


def denominators(reports: Iterable[tuple[float, Metrics]]) -> dict[str, float]:
    """Denominator of each mean of `mean_metrics`: the total weight of the sites that report it."""
    weights: dict[str, list[float]] = {}
    for weight, metrics in reports:
        for name, value in metrics.items():
            if value is not None:
                weights.setdefault(name, []).append(weight)
    # Weights are relative and may be huge, but JSON has no infinity.
    return {name: min(sum(known), sys.float_info.max) for name, known in sorted(weights.items())}


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    """A running mean like `fedpool.tasks.mean.weighted_mean`: equal values give that value."""
    heaviest = max(weight for weight, _ in pairs)
    mean = total = 0.0
    for weight, value in pairs:
        share = weight / heaviest if heaviest else 1.0
        total += share
        part = share / total if total else 0.0
        change = value - mean
        # The difference of values at both ends of the range overflows, and JSON has no infinity.
        mean = mean + change * part if math.isfinite(change) else mean * (1 - part) + value * part
    return mean


def best_round(scores: Sequence[float | None], mode: Literal["max", "min"]) -> int | None:
    """Index of the best score, the earliest of equals; None if there is no score."""
    known = [(score if mode == "max" else -score, -index) for index, score in enumerate(scores) if score is not None]
    return -max(known)[1] if known else None


def has_stalled(scores: Sequence[float | None], mode: Literal["max", "min"], patience: int) -> bool:
    """Whether the last `patience` scores are no better than the best before them."""
    best = best_round(scores, mode)
    return best is not None and len(scores) - 1 - best >= patience
