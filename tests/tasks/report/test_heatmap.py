"""The picture of a cross-site matrix: sound SVG whatever the names, darker where it is better,
empty where there is no score.
"""

import re
from xml.etree import ElementTree

import pytest

from fedpool.tasks.matrix import Matrix
from fedpool.tasks.report.heatmap import MAX_CELLS, heat_map

NUM = "NUM_STEPS_CURRENT_ROUND"
MATRIX: Matrix = {
    "site-1": {"server": {"acc": 0.25, NUM: 1.0}, "site-2": {"acc": 0.75, NUM: 1.0}},
    "site-2": {"server": {"acc": 0.5, NUM: 1.0}},
}


def fills(svg: str) -> list[str]:
    """The cells' colours, row by row."""
    return re.findall(r'<rect x="\d+" y="\d+" width="62" height="26" fill="(#\w+)"', svg)


def test_cells_are_the_darker_the_better_and_a_hole_is_white() -> None:
    picture = heat_map(MATRIX, "acc", "max")
    assert picture is not None and picture.key == "cross-site-map"
    assert fills(picture.svg) == ["#eff6ff", "#1e40af", "#869bd7", "#ffffff"]
    texts = [element.text for element in ElementTree.fromstring(picture.svg).iter() if element.tag.endswith("text")]
    assert {"site-1", "site-2", "server", "0.25", "0.75", "0.5"} <= set(texts)


def test_less_can_be_better() -> None:
    picture = heat_map(MATRIX, "acc", "min")
    assert picture is not None and fills(picture.svg)[:2] == ["#1e40af", "#eff6ff"]


def test_the_same_matrix_gives_the_same_text() -> None:
    assert heat_map(MATRIX, "acc", "max") == heat_map(
        {site: MATRIX[site] for site in reversed(list(MATRIX))}, "acc", "max"
    )


@pytest.mark.parametrize("scores", [{}, {"acc": None}, {"acc": 1e300}])
def test_without_a_value_that_can_be_drawn_there_is_no_picture(scores: dict[str, float | None]) -> None:
    assert heat_map({"site-1": {"server": {**scores, NUM: 1.0}}}, "acc", "max") is None


def test_names_and_huge_or_equal_values_cannot_break_it() -> None:
    row = {"<&>\0": {"acc<": 1e100, NUM: 1.0}, "x" * 100: {"acc<": -1e100, NUM: 1.0}}
    for matrix in ({"a": row}, {"a": {"server": {"acc<": 2.0, NUM: 1.0}}}):
        picture = heat_map(matrix, "acc<", "max")
        assert picture is not None
        ElementTree.fromstring(picture.svg)


def test_of_a_large_matrix_a_part_is_drawn_and_it_says_so() -> None:
    many = {f"s{number:03d}": {"server": {"acc": 0.5, NUM: 1.0}} for number in range(MAX_CELLS + 3)}
    picture = heat_map(many, "acc", "max")
    assert picture is not None and len(fills(picture.svg)) == MAX_CELLS
    assert "without 3 more sites and 0 more models" in picture.svg
