"""Retries: how long the pauses are, and when the attempts end."""

from collections.abc import Iterator

from fedpool.patience import pauses


class Clock:
    """A clock that a loop advances by its pauses and by the time that its attempts take."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(limit_s: float, pause_s: float, longest_s: float | None = None, *, try_s: float = 0.0) -> Iterator[float]:
    clock = Clock()
    for pause in pauses(limit_s, pause_s, longest_s, clock=clock):
        yield pause
        clock.now += try_s + pause


def test_tries_are_as_far_apart_as_the_pause_and_the_last_one_is_at_the_limit() -> None:
    assert list(run(1.0, 0.5)) == [0.5, 0.5, 0.0]


def test_the_last_pause_ends_at_the_limit() -> None:
    assert list(run(1.0, 0.75)) == [0.75, 0.25, 0.0]


def test_pauses_double_until_they_are_the_longest() -> None:
    assert list(run(16.0, 1.0, 4.0)) == [1.0, 2.0, 4.0, 4.0, 4.0, 1.0, 0.0]


def test_a_limit_of_zero_leaves_one_try_without_a_pause() -> None:
    assert list(run(0.0, 0.5)) == [0.0]


def test_a_try_that_takes_longer_than_the_limit_is_followed_by_one_more() -> None:
    assert list(run(1.0, 0.5, try_s=3.0)) == [0.5, 0.0]
