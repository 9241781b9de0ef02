"""`FLModel` and `ParamsType`: the names, defaults and refusals of the value that a script
receives and sends.
"""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from fedpool.model import NUM_STEPS, FLModel, ParamsType


def test_the_fields_and_their_order_are_those_of_nvflare_and_one_of_ours_after_them() -> None:
    names = [field.name for field in dataclasses.fields(FLModel)]
    assert names == [
        "params_type",
        "params",
        "optimizer_params",
        "metrics",
        "start_round",
        "current_round",
        "total_rounds",
        "meta",
        "extras",
    ]


def test_the_weight_key_is_that_of_nvflare() -> None:
    assert NUM_STEPS == "NUM_STEPS_CURRENT_ROUND"


def test_the_params_types_are_full_and_diff_and_equal_their_strings() -> None:
    assert [str(kind) for kind in ParamsType] == ["FULL", "DIFF"]
    assert ParamsType.DIFF == "DIFF"


def test_params_without_a_type_are_full() -> None:
    assert FLModel(params={"w": 1}).params_type is ParamsType.FULL


def test_a_type_given_as_a_string_becomes_the_enum() -> None:
    assert FLModel(params_type="DIFF", params={"w": 1}).params_type is ParamsType.DIFF


def test_metrics_alone_have_no_params_type() -> None:
    model = FLModel(metrics={"accuracy": 0.5})
    assert model.params_type is None
    assert model.params is None


def test_each_model_has_a_meta_dict_of_its_own() -> None:
    first, second = FLModel(), FLModel()
    first.meta[NUM_STEPS] = 3
    assert second.meta == {}


def test_meta_given_as_none_is_an_empty_dict() -> None:
    assert FLModel(meta=None).meta == {}  # type: ignore[arg-type]  # nvflare scripts do so


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"params_type": "FULL"}, ValueError, "params is None"),
        ({"params_type": "HALF", "params": {}}, ValueError, "HALF"),
        ({"metrics": [0.5]}, TypeError, "metrics must be a dict"),
        ({"meta": "steps"}, TypeError, "meta must be a dict"),
        ({"current_round": -1}, ValueError, "current_round"),
        ({"total_rounds": 2.5}, ValueError, "total_rounds"),
        ({"start_round": -3}, ValueError, "start_round"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FLModel(**fields)


def test_the_summary_counts_params_and_leaves_out_what_is_empty() -> None:
    model = FLModel(params={"w": 1, "b": 2}, current_round=3, total_rounds=5)
    assert model.summary() == {"params_type": ParamsType.FULL, "params": 2, "current_round": 3, "total_rounds": 5}


def test_the_repr_never_shows_tensors() -> None:
    shown = repr(FLModel(params={"secret_name": "secret value"}, metrics={"accuracy": 0.5}))
    assert shown.startswith("FLModel(")
    assert "'accuracy': 0.5" in shown
    assert "secret" not in shown


def test_the_module_imports_no_framework() -> None:
    code = "import sys, fedpool.model; print(sorted({'numpy', 'torch', 'prefect', 'pydantic'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
