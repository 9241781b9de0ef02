"""`round.json`: what was asked, what was answered, and what became of it."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from fedpool.messages import UpdateManifest
from fedpool.tasks.arithmetic import BEFORE
from fedpool.tasks.causes import causes
from fedpool.tasks.gate import Accepted, Failed, Late, Outcome, Rejected
from fedpool.tasks.record import (
    RoundRecord,
    SubmittedModel,
    Timings,
    WhoseModel,
    known_weights,
    of_global_models,
    round_ms,
)
from fedpool.tasks.recording import round_record
from fedpool.tensors import Digest
from tests.updates import sent_by

BASE, NEXT = Digest("b" * 64, 10), Digest("n" * 64, 11)


def manifest(site: str, **changes: Any) -> UpdateManifest:
    fields: dict[str, Any] = {
        "round": 2,
        "base_sha256": BASE.sha256,
        "sha256": "a" * 64,
        "size": 100,
        "seconds": 1.23456,
    }
    return sent_by(site, **{**fields, **changes})


def accepted(site: str, weight: float = 1.0, **changes: Any) -> Accepted:
    return Accepted(manifest(site, **changes), "m" * 64, weight, None)


def record(outcomes: Sequence[Outcome], **changes: Any) -> RoundRecord:
    fields: dict[str, Any] = {
        "job_id": "job-1",
        "round": 2,
        "task": "train",
        "outcomes": outcomes,
        "known_weights": {},
        "base": BASE,
        "following": NEXT,
        "state": None,
        "previous_sha256": "p" * 64,
        "timings": Timings(train_s=1.0, aggregate_s=0.235, round_s=1.235),
    }
    return round_record(**{**fields, **changes})


OUTCOMES: Sequence[Outcome] = (
    Failed("site-3", 0, "the script ended with exit code 1\nTraceback"),
    Rejected("site-2", 1, manifest("site-2", sha256="r" * 64), "n" * 64, "shape", "w: expected [2], got [3]"),
    accepted("site-4", 3.0, metrics={"acc": 0.9, "loss": None}, logged={"lr": 0.1}),
    accepted("site-1", 1.0, metrics={"acc": 0.5}),
    Late("site-5", 0),
)


def test_it_names_everyone_who_was_asked_and_what_became_of_them_in_sorted_order() -> None:
    made = record(OUTCOMES)
    assert made.sites == ("site-1", "site-2", "site-3", "site-4", "site-5")
    assert [entry.site for entry in made.accepted] == ["site-1", "site-4"]
    assert made.as_json()["rejected"] == [
        {
            "site": "site-2",
            "attempt": 1,
            "sha256": "r" * 64,
            "manifest_sha256": "n" * 64,
            "code": "shape",
            "reason": "w: expected [2], got [3]",
        }
    ]
    assert made.as_json()["failed"] == [
        {"site": "site-3", "attempt": 0, "cause": "the script ended with exit code 1\nTraceback"}
    ]
    assert made.as_json()["late"] == [{"site": "site-5", "attempt": 0}]


def test_an_accepted_update_is_recorded_with_hash_weight_metrics_and_seconds() -> None:
    assert record(OUTCOMES).as_json()["accepted"][1] == {
        "site": "site-4",
        "attempt": 0,
        "sha256": "a" * 64,
        "manifest_sha256": "m" * 64,
        "size": 100,
        "params_type": "FULL",
        "weight": 3.0,
        "metrics": {"acc": 0.9, "loss": None},
        "logged": {"lr": 0.1},
        "seconds": 1.235,
    }


def test_its_metrics_are_the_weighted_means_over_accepted_updates() -> None:
    made = record(OUTCOMES)
    assert made.metrics == pytest.approx({"acc": 0.8})
    assert made.logged == {"lr": 0.1}


def test_it_is_chained_to_the_round_before_and_the_models_around_it() -> None:
    made = record(OUTCOMES)
    assert made.previous_sha256 == "p" * 64
    assert made.base == BASE
    assert made.next_global == NEXT
    assert (made.protocol, made.job_id, made.round, made.task) == (3, "job-1", 2, "train")


def test_an_evaluation_makes_no_next_model() -> None:
    assert record(OUTCOMES, following=None).next_global is None


def test_it_is_json() -> None:
    made = record(OUTCOMES)
    assert json.loads(made.to_bytes()) == made.as_json()
    assert RoundRecord.from_bytes(made.to_bytes(), "here") == made


def test_times_are_kept_to_the_millisecond() -> None:
    assert round_ms(1.23456) == 1.235
    assert round_ms(0.0004) == 0.0


def test_a_score_without_a_weight_counts_as_much_as_the_sites_last_training() -> None:
    outcomes = [
        accepted("site-1", task="evaluate", metrics={"acc": 0.5}),
        accepted("site-2", task="evaluate", metrics={"acc": 0.9}),
        accepted("site-3", 4.0, task="evaluate", metrics={}, meta={"NUM_STEPS_CURRENT_ROUND": 4}),
    ]
    made = record(outcomes, task="evaluate", known_weights={"site-1": 3.0, "site-3": 9.0})
    assert [entry.weight for entry in made.accepted] == [3.0, 1.0, 4.0]
    assert made.metrics == pytest.approx({"acc": 0.6})


def test_scores_count_with_the_examples_that_they_are_of_where_a_site_says_so() -> None:
    outcomes = [
        accepted("site-1", 7.0, metrics={"acc": 0.5}, logged={"lr": 0.1}, meta={"NUM_EVAL_EXAMPLES": 30}),
        accepted("site-2", 10.0, metrics={"acc": 0.9}, logged={"lr": 0.3}),
        accepted("site-3", 5.0, metrics={"acc": 0.1}, meta={"NUM_EVAL_EXAMPLES": 0}),
    ]
    made = record(outcomes)
    assert [entry.weight for entry in made.accepted] == [7.0, 10.0, 5.0]  # the updates' own weights, as always
    assert [entry.num_eval_examples for entry in made.accepted] == [30.0, None, 0.0]
    assert made.metrics == pytest.approx({"acc": 0.6})
    assert made.denominators == {"acc": 40.0}
    assert made.logged == pytest.approx({"lr": (7 * 0.1 + 10 * 0.3) / 17})
    made = record(
        [accepted("site-1", task="evaluate", metrics={"acc": 0.5}, meta={"NUM_EVAL_EXAMPLES": 30})],
        task="evaluate",
        known_weights={"site-1": 3.0},
    )
    assert made.denominators == {"acc": 30.0}


def test_known_weights_are_those_of_the_last_accepted_training_update() -> None:
    first = record([accepted("site-1", 2.0), accepted("site-2", 5.0)])
    second = record([accepted("site-1", 3.0), Rejected("site-2", 0, manifest("site-2"), None, "shape", "w")])
    third = record([accepted("site-1", 8.0, task="evaluate", meta={"NUM_STEPS_CURRENT_ROUND": 8})], task="evaluate")
    assert known_weights([first, second, third]) == {"site-1": 3.0, "site-2": 5.0}
    assert known_weights([]) == {}


def test_the_causes_name_each_missing_site_and_why() -> None:
    assert causes(record(OUTCOMES)) == (
        "site-3 failed: the script ended with exit code 1\nTraceback\n"
        "site-2's update was rejected (shape): w: expected [2], got [3]\n"
        "site-5 was late: the round did not wait for it"
    )
    assert causes(record([accepted("site-1")])) == ""


def test_a_site_that_answered_when_it_was_asked_again_is_not_missing() -> None:
    made = record([Failed("site-1", 0, "it was lost"), accepted("site-1", attempt=1)])
    assert causes(made) == ""
    assert [entry.attempt for entry in (*made.failed, *made.accepted)] == [0, 1]


def test_it_says_what_each_mean_is_over() -> None:
    made = record(OUTCOMES)
    assert made.metrics == {"acc": pytest.approx(0.8)}
    assert made.denominators == {"acc": 4.0}


def test_it_says_whose_model_was_given_out_and_which_were_submitted() -> None:
    assert record([]).model == WhoseModel(owner="server", round=2) and "models" not in record([]).as_json()
    made = record([], task="evaluate", owner="site-1", origin=1, following=None)
    assert made.model == WhoseModel(owner="site-1", round=1)
    entry = SubmittedModel(owner="site-1", round=2, sha256="a" * 64, size=100)
    assert record([], task="submit_model", following=None, models=[entry]).models == (entry,)


def test_rounds_of_global_models_are_neither_submissions_nor_of_other_models() -> None:
    rounds = [
        record([]),
        record([], task="submit_model", following=None, models=[]),
        record([], task="evaluate", owner="server-best", origin=0, following=None),
        record([], task="evaluate", owner="site-1", origin=1, following=None),
        record([], task="evaluate", following=None),
    ]
    assert of_global_models(rounds) == [rounds[0], rounds[4]]


@pytest.mark.parametrize("count", [3, "many"])
def test_what_a_job_of_an_earlier_version_says_of_examples_had_no_meaning(count: float | str) -> None:
    entry = accepted("site-1", 2.0, metrics={"acc": 0.5}, meta={"NUM_EVAL_EXAMPLES": count})
    found = record([entry], arithmetic=BEFORE)
    assert found.accepted[0].num_eval_examples is None
    assert found.denominators == {"acc": 2.0}
