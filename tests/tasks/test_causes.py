"""Who is missing from a round and why: equal causes are reported once, with all their sites and
rounds.
"""

from typing import Any

import pytest

from fedpool.tasks.causes import causes, causes_over_rounds, round_numbers, uncounted, uncounted_over_rounds
from fedpool.tasks.record import RoundRecord
from tests.records import record_of

TRACEBACK = (
    'the script ended with exit code 1\nTraceback (most recent call last):\n  File "client.py", line 5\nKeyError: 1'
)


def a_round(number: int = 0, **changes: Any) -> RoundRecord:
    return record_of({"round": number, **changes})


def failed(*sites: str, cause: str = TRACEBACK) -> list[dict[str, Any]]:
    return [{"site": site, "attempt": 0, "cause": cause} for site in sites]


def rejected(*sites: str) -> list[dict[str, Any]]:
    return [{"site": site, "code": "shape", "reason": "w: expected [2], got [3]"} for site in sites]


def accepted(**weights: float) -> list[dict[str, Any]]:
    return [{"site": site, "weight": weight} for site, weight in weights.items()]


def test_equal_causes_are_told_once_with_all_their_sites() -> None:
    record = a_round(
        failed=[*failed("site-1", "site-2"), *failed("site-3", cause="was killed"), *failed("site-5")],
        rejected=rejected("site-4", "site-6"),
        late=[{"site": "site-7"}, {"site": "site-8"}],
    )
    assert causes(record) == (
        f"site-1, site-2, site-5 failed: {TRACEBACK}\n"
        "site-3 failed: was killed\n"
        "the updates of site-4, site-6 were rejected (shape): w: expected [2], got [3]\n"
        "site-7, site-8 were late: the round did not wait for them"
    )


def test_a_site_that_failed_alike_each_time_it_was_asked_is_named_once() -> None:
    assert causes(a_round(failed=failed("site-1", "site-1", "site-1"))) == f"site-1 failed: {TRACEBACK}"


def test_causes_that_differ_only_in_the_sites_own_name_are_told_once() -> None:
    sites = ("site-1", "site-2", "site-10")
    record = a_round(failed=[entry for site in sites for entry in failed(site, cause=f"round 0 at {site}: no send()")])
    assert causes(record) == "site-1, site-2, site-10 failed: round 0 at site-1: no send()"


def test_over_rounds_causes_that_differ_only_in_their_own_round_are_told_once() -> None:
    records = [a_round(number, failed=failed("a", cause=f"round {number} at a: no send()")) for number in (0, 1, 10)]
    assert causes_over_rounds(records) == ["a (rounds 0-1, 10) failed: round 0 at a: no send()"]


def test_causes_that_name_another_site_or_another_round_are_told_apart() -> None:
    record = a_round(
        1,
        failed=[
            *failed("site-1", cause="waits for site-2.x"),
            *failed("site-2", cause="waits for site-2.x"),
            *failed("site-3", cause="stopped in round 1"),
            *failed("site-4", cause="stopped in round 0"),
        ],
    )
    assert causes(record) == (
        "site-1, site-2 failed: waits for site-2.x\n"
        "site-3 failed: stopped in round 1\n"
        "site-4 failed: stopped in round 0"
    )


def test_over_rounds_a_cause_is_told_once_with_the_rounds_of_each_site() -> None:
    records = [
        a_round(0, failed=failed("site-1", "site-2")),
        a_round(1, failed=failed("site-1", "site-2", "site-3"), rejected=rejected("site-4")),
        a_round(2),
        a_round(3, rejected=rejected("site-4"), accepted=accepted(**{"site-1": 1.0})),
    ]
    assert causes_over_rounds(records) == [
        f"site-1, site-2 (rounds 0-1), site-3 (round 1) failed: {TRACEBACK}",
        "the update of site-4 (rounds 1, 3) was rejected (shape): w: expected [2], got [3]",
    ]


def test_a_site_that_answered_when_it_was_asked_again_is_not_missing() -> None:
    assert causes_over_rounds([a_round(failed=failed("site-1"), accepted=accepted(**{"site-1": 1.0}))]) == []


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([3], "round 3"), ([0, 1, 2, 5, 7, 8], "rounds 0-2, 5, 7-8"), ([0, 2], "rounds 0, 2")],
)
def test_rounds_are_named_in_runs(numbers: list[int], words: str) -> None:
    assert round_numbers(numbers) == words


def test_a_round_in_which_nothing_counts_says_by_whose_word() -> None:
    record = a_round(accepted=accepted(a=0.0, b=3.0, c=0.0))
    assert uncounted(record, {"b": 0.0}) == (
        "every update has weight 0, so the model stays as it is: a, c sent NUM_STEPS_CURRENT_ROUND 0; "
        "aggregation_weights is 0 for b. Send the number of local steps or rows, or leave it out to count as 1"
    )


@pytest.mark.parametrize(
    "record",
    [
        a_round(accepted=accepted(a=0.0, b=3.0)),
        a_round(accepted=[]),
        a_round(accepted=accepted(a=0.0), task="evaluate"),
    ],
)
def test_a_site_without_data_beside_others_is_nothing_to_speak_of(record: RoundRecord) -> None:
    assert uncounted(record, {}) is None


def test_over_rounds_the_same_is_said_once() -> None:
    records = [a_round(number, accepted=accepted(a=0.0)) for number in range(3)]
    (said,) = uncounted_over_rounds(records, {})
    assert said.startswith("rounds 0-2: every update has weight 0")
