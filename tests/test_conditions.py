"""`stop_cond`: what parses, what it means, and how anything else is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpool.conditions import StopCondition, parse_condition
from fedpool.errors import RecipeError


@pytest.mark.parametrize(
    "text", ["accuracy >= 0.8", "accuracy>=0.8", "  accuracy  >=  0.8  ", "accuracy >=.8", "accuracy>= 8e-1"]
)
def test_spaces_and_the_way_a_number_is_written_do_not_matter(text: str) -> None:
    assert parse_condition(text) == StopCondition("accuracy", ">=", 0.8)


@pytest.mark.parametrize(
    ("comparison", "holds"),
    [(">=", (False, True, True)), (">", (False, False, True)), ("<=", (True, True, False)), ("<", (True, False, False)),
     ("==", (False, True, False))],
)  # fmt: skip
def test_each_comparison_means_what_it_says(comparison: str, holds: tuple[bool, bool, bool]) -> None:
    condition = parse_condition(f"loss {comparison} 0.5")
    assert tuple(condition.holds({"loss": value}) for value in (0.4, 0.5, 0.6)) == holds


@pytest.mark.parametrize("name", ["val/accuracy", "val_acc", "f1-score", "acc@1", "Genauigkeit.ä"])
def test_a_metric_may_have_any_name_without_blanks_or_comparisons(name: str) -> None:
    assert parse_condition(f"{name}>=-2").metric == name


@pytest.mark.parametrize("metrics", [{}, {"loss": 1.0}, {"accuracy": None}, {"accuracy": float("nan")}])
def test_a_metric_that_is_absent_or_no_number_does_not_satisfy_it(metrics: dict[str, float | None]) -> None:
    assert not parse_condition("accuracy >= 0").holds(metrics)


@pytest.mark.parametrize(
    "text",
    ["", "accuracy", "accuracy >=", ">= 0.8", "accuracy 0.8", "accuracy = 0.8", "accuracy => 0.8", "accuracy != 0.8",
     "accuracy >= high", "accuracy >= nan", "accuracy >= inf", "accuracy >= 0.8 or loss < 1", "0.5 < accuracy < 0.8", "a b >= 1"],
)  # fmt: skip
def test_anything_else_is_refused_with_the_form_that_is_wanted(text: str) -> None:
    with pytest.raises(RecipeError, match="metric >= number") as refused:
        parse_condition(text)
    assert repr(text) in str(refused.value)


@settings(max_examples=100)
@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([">=", "<=", "==", ">", "<"]))
def test_a_condition_written_out_and_parsed_again_is_the_same(threshold: float, comparison: str) -> None:
    condition = StopCondition("accuracy", comparison, threshold)
    assert parse_condition(str(condition)) == condition


def test_a_condition_reads_as_a_person_wrote_it() -> None:
    assert str(parse_condition("accuracy>=0.8")) == "accuracy >= 0.8"
