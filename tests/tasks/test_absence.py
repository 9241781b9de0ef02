"""Which sites a round goes ahead without."""

from typing import Any

from fedpool.tasks.absence import how_to_resume, left_out, silent
from fedpool.tasks.record import RoundRecord
from tests.records import record_of


def record(**kinds: list[dict[str, Any]]) -> RoundRecord:
    return record_of(kinds)


def sites(*names: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"site": name, **fields} for name in names]


AWAY = record(accepted=sites("a", "b"), failed=sites("c", away=True))


def test_a_site_that_could_not_be_reached_is_silent_until_it_answers() -> None:
    assert silent([]) == frozenset()
    assert silent([AWAY]) == {"c"}
    left = record(accepted=sites("a", "b"), not_asked=sites("c", reason="no worker online"))
    assert silent([AWAY, left]) == {"c"}
    for answer in ("accepted", "rejected", "probed"):
        assert silent([AWAY, left, record(**{answer: sites("c")})]) == frozenset()
    assert silent([AWAY, record(failed=sites("c"))]) == frozenset()  # its script raised, so the site was reachable
    assert silent([AWAY, record(accepted=sites("a"))]) == {"c"}  # it was not drawn for this round, which tells nothing


def test_a_site_that_was_late_is_silent_too() -> None:
    assert silent([record(accepted=sites("a"), late=sites("b"))]) == {"b"}


def test_a_site_that_was_asked_again_and_answered_is_not_silent() -> None:
    assert silent([record(failed=sites("c", away=True), accepted=sites("c"))]) == frozenset()


def test_only_silent_sites_that_cannot_be_reached_are_left_out() -> None:
    unreachable = {"b": "no worker online", "c": "its work pool is paused"}
    # b answered in the last round: this one waits for it.
    found = left_out([AWAY], ("a", "b", "c"), unreachable, probes=(), needed=2)
    assert found == {"c": "its work pool is paused"}
    assert left_out([AWAY], ("a", "b", "c"), {}, probes=(), needed=2) == {}  # it is reachable again
    assert left_out([AWAY], ("a", "b"), unreachable, probes=(), needed=2) == {}  # it was not drawn


def test_nobody_is_left_out_when_too_few_would_be_left() -> None:
    unreachable = {"c": "no worker online"}
    assert left_out([AWAY], ("a", "b", "c"), unreachable, probes=(), needed=3) == {}
    assert left_out([AWAY], ("a", "b", "c"), unreachable, probes=("a",), needed=2) == {}  # a's update would not count


def test_a_round_that_failed_of_them_says_how_to_go_on() -> None:
    assert how_to_resume(AWAY) == "\nonce c can be reached again: fedpool job resume job-1"
    assert how_to_resume(record(failed=sites("c"))) == ""
