"""Findings about a job that its table doesn't show: pure functions of the rounds' records."""

from collections.abc import Mapping, Sequence

from fedpool.tasks.causes import causes_over_rounds, uncounted_over_rounds
from fedpool.tasks.key_metric import MetricRules, metric_gap
from fedpool.tasks.record import RoundRecord


def findings(rules: MetricRules, factors: Mapping[str, float], records: Sequence[RoundRecord]) -> list[str]:
    """Warnings first, then which sites are missing from which rounds, and why.

    Args:
        rules: the recipe's fields about metrics.
        factors: its `aggregation_weights`.
    """
    gap = metric_gap(rules, records)
    warnings = [gap.text] if gap is not None else []
    return [*warnings, *uncounted_over_rounds(records, factors), *causes_over_rounds(records)]
