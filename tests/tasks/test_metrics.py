"""A global model's metrics, and what depends on them: the best round and early stopping."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpool.tasks.metrics import Metrics, best_round, denominators, has_stalled, mean_metrics

scores = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=12)
modes = st.sampled_from(["max", "min"])


def test_the_mean_is_weighted_over_the_sites_that_report_a_metric() -> None:
    reports: list[tuple[float, Metrics]] = [(1, {"acc": 0.5, "loss": 1.0}), (3, {"acc": 0.9}), (5, {})]
    assert mean_metrics(reports) == pytest.approx({"acc": 0.8, "loss": 1.0})


def test_the_denominator_of_a_mean_is_the_weight_of_the_sites_that_report_the_metric() -> None:
    reports: list[tuple[float, Metrics]] = [(1, {"acc": 0.5, "loss": 1.0}), (3, {"acc": 0.9, "loss": None}), (5, {})]
    assert denominators(reports) == {"acc": 4, "loss": 1}
    assert denominators([(1e308, {"acc": 1.0}), (1e308, {"acc": 0.0})])["acc"] < float("inf")


def test_a_metric_that_was_no_finite_number_is_left_out() -> None:
    assert mean_metrics([(1, {"acc": None}), (1, {"acc": 0.5, "loss": None})]) == {"acc": 0.5}


def test_where_all_weights_are_0_the_plain_mean_is_taken() -> None:
    assert mean_metrics([(0, {"acc": 0.5}), (0, {"acc": 1.0}), (2, {"loss": 3.0})]) == {"acc": 0.75, "loss": 3.0}


def test_a_site_of_weight_0_does_not_move_the_mean() -> None:
    assert mean_metrics([(0, {"acc": 0.0}), (2, {"acc": 1.0})]) == {"acc": 1.0}


def test_nothing_reported_is_nothing_scored() -> None:
    assert mean_metrics([]) == {}
    assert mean_metrics([(1, {})]) == {}


def test_metrics_at_both_ends_of_the_range_have_a_finite_mean() -> None:
    largest = 1.7e308
    assert mean_metrics([(1.0, {"acc": largest}), (1.0, {"acc": -largest})]) == {"acc": 0.0}
    assert mean_metrics([(1.0, {"acc": -largest}), (3.0, {"acc": largest})]) == {"acc": pytest.approx(largest / 2)}


def test_names_are_sorted_and_huge_weights_do_not_overflow() -> None:
    found = mean_metrics([(1.7e308, {"b": 1.0, "a": 2.0}), (1.7e308, {"b": 3.0})])
    assert list(found.items()) == [("a", 2.0), ("b", 2.0)]


@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=10))
def test_the_mean_is_the_one_that_numpy_gives(pairs: list[tuple[float, float]]) -> None:
    expected = np.average([value for _, value in pairs], weights=[weight for weight, _ in pairs])
    found = mean_metrics((weight, {"m": value}) for weight, value in pairs)["m"]
    assert found == pytest.approx(float(expected), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [
        ([0.1, 0.9, 0.5], "max", 1),
        ([0.1, 0.9, 0.5], "min", 0),
        ([0.5, 0.5, 0.5], "max", 0),
        ([0.5, 0.5, 0.5], "min", 0),
        ([None, 0.2, None, 0.3], "max", 3),
        ([None, None], "max", None),
        ([], "min", None),
        ([-1.0], "max", 0),
    ],
)
def test_the_best_round_is_the_earliest_with_the_best_score(
    values: list[float | None], mode: Literal["max", "min"], best: int | None
) -> None:
    assert best_round(values, mode) == best


@settings(max_examples=100)
@given(scores, modes)
def test_no_score_is_better_than_the_best(values: list[float | None], mode: Literal["max", "min"]) -> None:
    best = best_round(values, mode)
    known = [value for value in values if value is not None]
    assert (best is None) == (not known)
    if best is not None:
        assert values[best] == (max(known) if mode == "max" else min(known))
        assert values[best] not in values[:best]


@pytest.mark.parametrize(
    ("values", "patience", "stalled"),
    [
        ([], 1, False),
        ([None, None, None], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.5], 1, True),
        ([0.5, 0.6], 1, False),
        ([0.5, 0.6, 0.6], 2, False),
        ([0.5, 0.6, 0.6, 0.4], 2, True),
        ([0.5, None], 1, True),
        ([0.9, 0.1, 0.2, 0.3], 3, True),
    ],
)
def test_a_job_has_stalled_after_patience_rounds_without_a_better_score(
    values: list[float | None], patience: int, stalled: bool
) -> None:
    assert has_stalled(values, "max", patience) is stalled
    assert has_stalled([None if value is None else -value for value in values], "min", patience) is stalled
