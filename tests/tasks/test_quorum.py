"""When a round closes: quorum, grace and over-sampling."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fedpool.tasks.quorum import Quorum

TIMES = st.lists(st.floats(0, 1e4), max_size=20).map(sorted)


def test_without_a_rule_a_round_waits_for_everyone() -> None:
    assert Quorum(2).closes_after([1.0, 2.0, 3.0]) is None


def test_the_grace_is_a_share_of_the_time_until_the_quorum() -> None:
    rule = Quorum(2, grace=0.5)
    assert rule.closes_after([1.0]) is None
    assert rule.closes_after([1.0, 4.0]) == 6.0
    assert rule.closes_after([1.0, 4.0, 5.0]) == 6.0  # an update within the grace does not extend it


def test_without_patience_a_round_closes_with_its_quorum() -> None:
    assert Quorum(2, grace=0.0).closes_after([1.0, 4.0]) == 4.0


def test_a_round_that_wants_so_many_closes_with_the_last_of_them() -> None:
    rule = Quorum(1, take=3)
    assert rule.closes_after([1.0, 2.0]) is None
    assert rule.closes_after([1.0, 2.0, 2.5]) == 2.5


@given(TIMES, st.integers(1, 5), st.none() | st.floats(0, 10), st.none() | st.integers(1, 10))
def test_a_round_never_closes_before_its_quorum_and_never_later_with_more_updates(
    times: list[float], min_clients: int, grace: float | None, take: int | None
) -> None:
    rule = Quorum(min_clients, grace, None if take is None else max(take, min_clients))
    closes = [rule.closes_after(times[:count]) for count in range(len(times) + 1)]
    assert all(close is None for close in closes[:min_clients])
    known = [close for close in closes if close is not None]
    if take is None:  # a round that wants so many closes with the last of them
        assert all(later <= earlier for earlier, later in pairwise(known))
    assert all(close >= times[min_clients - 1] for close in known)
