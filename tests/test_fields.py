"""Invalid fields are refused with fedpool's own messages: all of them, by name, with the value and
what was probably meant.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest

from fedpool import FedAvgRecipe, FedEvalRecipe, FedpoolError, PocEnv, ProdEnv, RecipeError, SimEnv
from fedpool.fields import nearest


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "client.py").write_text("pass\n")
    model = {"w": np.zeros(2)}
    return {"name": "n", "model": model, "train_script": tmp_path / "client.py", "min_clients": 2, "num_rounds": 1}


def refusal(kind: Any, fields: dict[str, Any]) -> str:
    with pytest.raises(FedpoolError) as refused:
        kind(**fields)
    return str(refused.value)


@pytest.mark.parametrize("caught", [FedpoolError, RecipeError, ValueError, pydantic.ValidationError])
def test_it_is_caught_as_an_error_of_fedpool_and_as_before(caught: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(caught) as refused:
        FedAvgRecipe(**fields | {"num_rounds": 0})
    assert refused.value.errors()[0]["loc"] == ("num_rounds",)


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (SimEnv, {"num_client": 2}, "SimEnv: num_client: did you mean num_clients? There is no such field"),
        (SimEnv, {"GPUs": "0"}, "GPUs: did you mean gpus?"),
        (PocEnv, {"databse": "x"}, "databse: did you mean database?"),
        (ProdEnv, {"store": "/s", "sites": ("a",), "api_ur": "http://x"}, "api_ur: did you mean api_url?"),
    ],
)
def test_an_unknown_field_names_the_nearest_one(kind: Any, given: dict[str, Any], words: str) -> None:
    assert words in refusal(kind, given)


@pytest.mark.parametrize(
    ("kind", "first"), [(FedAvgRecipe, "name"), (SimEnv, "num_clients"), (PocEnv, "num_clients"), (ProdEnv, "store")]
)
def test_a_value_without_a_name_is_told_the_first_field(kind: Any, first: str, fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as refused:
        kind("x", **(fields if kind is FedAvgRecipe else {}))
    kind = kind.__name__
    assert str(refused.value) == (
        f"{kind} takes its fields by name, got 'x' without one: write {kind}({first}=...) if you mean {first}"
    )


@pytest.mark.parametrize(("kind", "field"), [(SimEnv, "workspace"), (PocEnv, "home")])
def test_a_folder_that_is_a_file_or_lies_in_one_is_refused(kind: Any, field: str, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.touch()
    assert f"{field} '{file}' is a file. Give a folder" in refusal(kind, {field: file})
    assert f"'{file}/jobs' cannot exist: {file} is a file. Give a folder" in refusal(kind, {field: file / "jobs"})
    assert getattr(kind(**{field: tmp_path / "new" / "jobs"}), field) == tmp_path / "new" / "jobs"


def test_a_field_that_is_like_no_other_names_those_that_there_are(fields: dict[str, Any]) -> None:
    words = refusal(FedAvgRecipe, fields | {"xyzzy": 1})
    assert "xyzzy: there is no such field: use one of name, model, train_script" in words


def test_a_field_that_an_evaluation_has_not_is_not_offered(fields: dict[str, Any]) -> None:
    del fields["num_rounds"]
    assert "stop_cond" not in refusal(FedEvalRecipe, fields | {"stop_cnd": "x"})


def test_all_problems_are_listed_without_a_link_or_a_code(fields: dict[str, Any]) -> None:
    del fields["num_rounds"]
    words = refusal(FedAvgRecipe, fields | {"num_round": 1, "min_clients": 0, "train_args": 3, "seed": "x"})
    assert words.splitlines() == [
        "FedAvgRecipe has 5 problems:",
        "  train_args: must be a valid string, or must be a valid tuple, got 3",
        "  min_clients: must be greater than or equal to 1, got 0",
        "  seed: must be a valid integer, got 'x'",
        "  num_rounds: is required, but was not given",
        "  num_round: did you mean num_rounds? There is no such field",
    ]


def test_a_problem_inside_a_field_names_its_place(fields: dict[str, Any]) -> None:
    assert "aggregation_weights['site-1']: must be a valid number, got 'heavy'" in refusal(
        FedAvgRecipe, fields | {"aggregation_weights": {"site-1": "heavy"}}
    )


def test_a_check_of_ours_names_its_field_once(fields: dict[str, Any]) -> None:
    assert refusal(FedAvgRecipe, fields | {"stop_cond": "good"}).startswith("FedAvgRecipe: stop_cond 'good' is not")


def test_a_secret_is_not_shown() -> None:
    words = refusal(ProdEnv, {"store": "/s", "sites": ("a",), "auth_string": 4711, "storage_options": "key-4712"})
    assert "auth_string" in words and "storage_options" in words
    assert "4711" not in words and "4712" not in words


def test_a_frozen_value_says_what_to_do_instead(fields: dict[str, Any]) -> None:
    recipe = FedAvgRecipe(**fields)
    with pytest.raises(RecipeError, match="a FedAvgRecipe is frozen: build a new one with num_rounds=5"):
        recipe.num_rounds = 5  # type: ignore[misc]  # the mistake that is tested


def test_it_can_cross_to_another_process(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as refused:
        FedAvgRecipe(**fields | {"num_rounds": 0})
    again = pickle.loads(pickle.dumps(refused.value))  # noqa: S301  # our own bytes
    assert isinstance(again, RecipeError) and str(again) == str(refused.value)


@pytest.mark.parametrize(("name", "meant"), [("num_round", "num_rounds"), ("Seed", "seed"), ("zzz", None)])
def test_the_nearest_name_is_the_one_that_was_probably_meant(name: str, meant: str | None) -> None:
    assert nearest(name, ["seed", "num_rounds"]) == meant
