"""A metric that the recipe uses but no site reports: an error if the user asked for it, otherwise
a warning.
"""

from typing import Any

import pytest

from fedpool.tasks.key_metric import MetricRules, metric_gap
from fedpool.tasks.record import RoundRecord
from tests.records import job_of, record_of


def a_round(
    number: int, *metrics: str, task: str = "train", logged: tuple[str, ...] = (), **values: Any
) -> RoundRecord:
    entry = {"metrics": dict.fromkeys(metrics, 0.5) | values, "logged": dict.fromkeys(logged, 1.0)}
    return record_of({"round": number, "task": task, "accepted": [entry]})


def rules(**changes: Any) -> MetricRules:
    fields: dict[str, Any] = {"key_metric": "accuracy", "stop_cond": None, "patience": None}
    return MetricRules(**fields | changes, given=frozenset(changes))


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"key_metric": "accuracy"}, "key_metric='accuracy' needs the metric 'accuracy'. "),
        ({"stop_cond": "accuracy >= 0.8"}, "stop_cond='accuracy >= 0.8' needs the metric 'accuracy'. "),
        ({"patience": 3}, "patience=3 needs the metric 'accuracy'. "),
    ],
)
def test_what_the_user_asked_for_is_an_error_with_the_nearest_name(asked: dict[str, Any], what: str) -> None:
    gap = metric_gap(rules(**asked), [a_round(0, "acuracy", "loss")])
    assert gap is not None and gap.is_fatal
    assert gap.text == (
        f"{what}In round 0 sites reported the metrics acuracy, loss: "
        "the script sends 'acuracy'; give that name or correct the script"
    )


def test_a_stop_condition_goes_by_a_metric_of_its_own() -> None:
    assert metric_gap(rules(stop_cond="f1 >= 0.5"), [a_round(0, "accuracy", "f1")]) is None
    gap = metric_gap(rules(stop_cond="f1 >= 0.5"), [a_round(0, "accuracy")])
    assert gap is not None and gap.is_fatal and "needs the metric 'f1'" in gap.text


def test_what_nobody_asked_for_is_a_warning() -> None:
    gap = metric_gap(rules(), [a_round(0, "loss")])
    assert gap is not None and not gap.is_fatal
    assert "the key metric 'accuracy' is missing, so the last model counts as the best" in gap.text
    assert "In round 0 sites reported the metric loss: send FLModel(metrics={'accuracy': ...})" in gap.text


def test_without_any_metric_only_what_was_asked_for_is_missed() -> None:
    records = [a_round(0), a_round(1)]
    assert metric_gap(rules(), records) is None
    gap = metric_gap(rules(patience=2), records)
    assert gap is not None and gap.is_fatal and "In round 0 sites reported no metric" in gap.text


def test_a_metric_that_was_only_logged_is_named() -> None:
    gap = metric_gap(rules(patience=2), [a_round(0, logged=("accuracy",))])
    assert (
        gap is not None and "although they logged accuracy: send it as FLModel(metrics={'accuracy': ...})" in gap.text
    )


def test_a_metric_that_was_not_finite_was_reported() -> None:
    assert metric_gap(rules(key_metric="accuracy"), [a_round(0, accuracy=None)]) is None


def test_the_first_round_with_metrics_decides_whatever_comes_later() -> None:
    records = [a_round(0), a_round(1, "loss"), a_round(2, "accuracy")]
    gaps = [metric_gap(rules(), records[:number]) for number in range(4)]
    assert gaps[0] is gaps[1] is None
    assert gaps[2] is not None and gaps[2] == gaps[3] and "In round 1" in gaps[2].text


def test_an_evaluation_alone_goes_by_no_metric() -> None:
    assert metric_gap(rules(key_metric="accuracy"), [a_round(0, "loss", task="evaluate")]) is None


def test_a_job_of_an_earlier_version_is_warned_at_most() -> None:
    stored = {"recipe": {"key_metric": "accuracy", "stop_cond": "accuracy >= 0.8", "patience": 2}}
    gap = metric_gap(MetricRules.stored(job_of(stored)), [a_round(0, "loss")])
    assert gap is not None and not gap.is_fatal
    given = MetricRules.stored(job_of(stored | {"given": ["stop_cond"]}))
    assert (gap := metric_gap(given, [a_round(0, "loss")])) is not None and gap.is_fatal
