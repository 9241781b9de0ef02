"""The order of sites: by name, with numbers compared as numbers."""

import random

from hypothesis import given
from hypothesis import strategies as st

from fedpool.site_order import by_site, in_order, natural_key

names = st.text("ab019._-", min_size=1, max_size=6)


def test_numbers_count_as_numbers() -> None:
    assert in_order(["site-10", "site-9", "site-1", "site-2"]) == ["site-1", "site-2", "site-9", "site-10"]
    assert in_order(["b", "a10", "a9b", "a9", "10", "9"]) == ["9", "10", "a9", "a9b", "a10", "b"]


def test_names_that_differ_in_leading_zeros_have_an_order_too() -> None:
    assert in_order(["site-1", "site-01", "site-001"]) == ["site-001", "site-01", "site-1"]


@given(st.lists(names))
def test_the_order_is_one_whatever_it_is_made_from(found: list[str]) -> None:
    shuffled = found.copy()
    random.Random(0).shuffle(shuffled)
    assert in_order(shuffled) == in_order(found)
    assert len({natural_key(name) for name in found}) == len(set(found))


def test_what_belongs_to_one_site_stays_in_its_order() -> None:
    assert by_site([("b", 2), ("a", 2), ("b", 1), ("a", 1)], lambda item: item[0]) == [
        ("a", 2),
        ("a", 1),
        ("b", 2),
        ("b", 1),
    ]
