"""Taking over a round that an earlier coordinator began, and asking lost sites again."""

import pytest

from fedpool.paths import JobPaths
from fedpool.tasks.answers import Again, Asked, asked_before

PATHS = JobPaths("job")


def found(*paths: str) -> list[str]:
    folder = PATHS.round(3)
    return [path.removeprefix(f"{folder}/") for path in paths]


@pytest.mark.parametrize("lives_on", [True, False])
def test_an_update_whose_manifest_is_there_is_used(lives_on: bool) -> None:
    lies = found(PATHS.update(3, "a"), PATHS.manifest(3, "a"), PATHS.manifest(3, "b", 2), PATHS.update(3, "b", 1))
    assert asked_before(lies, lives_on=lives_on) == {"a": Asked(0, answered=True), "b": Asked(2, answered=True)}


def test_a_site_that_lives_on_is_waited_for() -> None:
    lies = found(PATHS.assignment(3, "a"), PATHS.assignment(3, "b", 1), PATHS.update(3, "b", 1))
    assert asked_before(lies, lives_on=True) == {"a": Asked(0, answered=False), "b": Asked(1, answered=False)}


def test_a_site_that_was_lost_is_asked_again_beside_what_it_left() -> None:
    lies = found(PATHS.update(3, "a"), PATHS.update(3, "b", 1), PATHS.global_model(3))
    assert asked_before(lies, lives_on=False) == {"a": Asked(1, answered=False), "b": Asked(2, answered=False)}


def test_a_round_of_which_nothing_is_there_is_begun_from_nothing() -> None:
    assert asked_before(found(PATHS.global_model(3)), lives_on=True) == {}


def test_a_site_that_was_lost_is_asked_again_at_once_so_often_as_is_said() -> None:
    again = Again(retries=2, patience_s=0)
    assert [again.after_loss(now) for now in (0.0, 500.0, 501.0)] == [0.0, 0.0, None]


def test_after_that_it_is_asked_again_after_pauses_that_grow_while_the_patience_lasts() -> None:
    again = Again(retries=1, patience_s=10)
    assert [again.after_loss(now) for now in (100.0, 101.0, 103.0, 105.5)] == [0.0, 1.0, 2.0, 4.0]
    assert again.after_loss(109.5) is None  # the next pause, of 8 s, would outlast the patience


def test_the_patience_counts_from_the_first_loss() -> None:
    again = Again(retries=0, patience_s=10)
    assert again.after_loss(0.0) == 1.0
    assert again.after_loss(9.0) is None
