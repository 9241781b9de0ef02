"""Which sites take part in a round: a function of the seed, the round and the set of sites."""

import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from fedpool.site_order import in_order
from fedpool.tasks.sampling import choose_sites

SITES = [f"site-{number}" for number in range(1, 11)]
sites = st.sets(st.text("abc123", min_size=1, max_size=4), min_size=1, max_size=20)


@settings(max_examples=100)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10_000), sites, st.integers(1, 25))
def test_a_draw_is_in_order_without_repetition_and_as_large_as_asked(
    seed: int, round: int, names: set[str], count: int
) -> None:
    chosen = choose_sites(seed, round, names, count)
    assert list(chosen) == in_order(set(chosen))
    assert set(chosen) <= names
    assert len(chosen) == min(count, len(names))


@settings(max_examples=50)
@given(st.integers(0, 2**63 - 1), st.integers(0, 100), sites, st.integers(1, 20), st.randoms())
def test_the_order_of_the_sites_does_not_matter(
    seed: int, round: int, names: set[str], count: int, random: object
) -> None:
    shuffled = sorted(names)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis's Random has no public type
    assert choose_sites(seed, round, shuffled, count) == choose_sites(seed, round, names, count)


def test_without_a_count_all_sites_take_part() -> None:
    assert choose_sites(0, 0, SITES, None) == tuple(SITES)  # and not site-10 before site-2


def test_rounds_and_seeds_draw_differently() -> None:
    assert len({choose_sites(0, round, SITES, 5) for round in range(20)}) > 10
    assert len({choose_sites(seed, 0, SITES, 5) for seed in range(20)}) > 10


def test_every_site_has_its_turn() -> None:
    assert {site for round in range(50) for site in choose_sites(0, round, SITES, 2)} == set(SITES)


def test_the_draw_is_the_same_in_another_process_with_another_hash_seed() -> None:
    code = f"from fedpool.tasks.sampling import choose_sites; print(choose_sites(7, 3, set({SITES!r}), 4))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{choose_sites(7, 3, SITES, 4)}\n"}


def test_the_draw_of_a_released_version_never_changes() -> None:
    assert choose_sites(0, 0, SITES, 3) == ("site-6", "site-7", "site-10")
