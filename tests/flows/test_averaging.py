"""A recipe's `aggregator` field: accepted values, JSON in a job, and a deployment's form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import is_valid_schema, validate

from fedpool import (
    Bulyan,
    FedAvgRecipe,
    FedOptRecipe,
    GeometricMedian,
    Krum,
    MultiKrum,
    RecipeError,
    Store,
    TrimmedMean,
)
from fedpool.flows.averaging import AveragingRecipe
from fedpool.flows.deployed import deployed, form_fields
from fedpool.flows.staging import check_unchanged, stage
from fedpool.flows.stored import recipe_of
from fedpool.tasks.choose_aggregator import written
from fedpool.tasks.own_function import OwnFunction
from fedpool.tasks.robust import median

SITES = tuple(f"site-{number}" for number in range(1, 12))
PLAIN: dict[str, Any] = {
    "num_byzantine": None,
    "trim_ratio": None,
    "num_selected": None,
    "clip_norm": None,
    "even_median": None,
    "weighted_median": None,
}
"""The fields beside the aggregator's name in a job of an earlier version."""


@pytest.fixture
def recipe(write_script: Callable[..., Path]) -> Callable[..., FedAvgRecipe]:
    """Makes a recipe: `recipe(aggregator=...)`, with min_clients=11 by default."""
    script = write_script("import fedpool.client as flare\n")

    def make(kind: type[FedAvgRecipe] = FedAvgRecipe, **fields: Any) -> FedAvgRecipe:
        given = {"name": "x", "min_clients": 11, "num_rounds": 1, "model": {"w": np.zeros(2, np.float32)}}
        return kind(**{**given, "train_script": str(script), **fields})

    return make


@pytest.mark.parametrize(
    ("aggregator", "min_clients", "message"),
    [
        (
            Bulyan(num_byzantine=2),
            10,
            r"aggregator Bulyan\(num_byzantine=2, even_median='element'\) needs 11 updates, but min_clients=10",
        ),
        (Krum(num_byzantine=2), 6, "needs 7 updates, but min_clients=6 lets a round have fewer: raise min_clients"),
        ({"kind": "multi_krum", "num_byzantine": 2, "num_selected": 8}, 11, "needs 12 updates"),
        (TrimmedMean(trim_ratio=0.1), 9, "needs 10 updates"),
        ("krum", 11, r'FedAvgRecipe: aggregator "krum" needs num_byzantine: Krum\(num_byzantine=\.\.\.\)'),
        ("medien", 11, 'FedAvgRecipe: aggregator "medien" is unknown. Did you mean "median"'),
        (
            {"kind": "krum", "num_byzantine": 0},
            11,
            "Recipe: aggregator: Krum: num_byzantine: must be greater than or equal to 1",
        ),
    ],
)
def test_an_aggregator_that_cannot_work_is_refused_when_the_recipe_is_built(
    recipe: Callable[..., FedAvgRecipe], aggregator: Any, min_clients: int, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(aggregator=aggregator, min_clients=min_clients)
    recipe(aggregator="mean").revise(min_clients=min_clients)
    with pytest.raises(RecipeError, match=message):
        recipe(aggregator="mean").revise(min_clients=min_clients, aggregator=aggregator)


def test_the_flat_fields_are_gone(recipe: Callable[..., FedAvgRecipe]) -> None:
    with pytest.raises(RecipeError, match=r"Krum\(num_byzantine=\.\.\.\).*\n  num_byzantine: there is no such field"):
        recipe(aggregator="krum", num_byzantine=2)


@pytest.mark.parametrize(
    ("aggregator", "as_json"),
    [
        ("mean", "mean"),
        (MultiKrum(num_byzantine=2), {"kind": "multi_krum", "num_byzantine": 2, "num_selected": None}),
        (GeometricMedian(weighted=False), {"kind": "geometric_median", "weighted": False}),
        (median, "fedpool.tasks.robust:median"),
    ],
)
def test_a_job_has_its_aggregator_as_json_and_restores_it(
    recipe: Callable[..., FedAvgRecipe], tmp_path: Path, aggregator: Any, as_json: Any
) -> None:
    store, given = Store(tmp_path / "store"), recipe(aggregator=aggregator)
    stage(given, "job-1", store, SITES)
    assert store.read_json("job-1/job.json")["recipe"]["aggregator"] == as_json
    again = recipe_of("job-1", store)
    assert isinstance(again, FedAvgRecipe) and again.rule == given.rule
    assert again.functions == ((as_json,) if isinstance(given.rule, OwnFunction) else ())
    check_unchanged(given, "job-1", store, SITES)
    with pytest.raises(RecipeError, match=r"aggregator: .* in the job, .*krum.* here"):
        check_unchanged(recipe(aggregator=Krum(num_byzantine=1)), "job-1", store, SITES)


@pytest.mark.parametrize("kind", [FedAvgRecipe, FedOptRecipe])
@pytest.mark.parametrize(
    ("flat", "today"),
    [
        ({"aggregator": "mean", **PLAIN}, "mean"),
        ({"aggregator": "median"}, "median"),
        ({"aggregator": "krum", **PLAIN, "num_byzantine": 2}, {"kind": "krum", "num_byzantine": 2}),
        (
            {"aggregator": "multi_krum", **PLAIN, "num_byzantine": 1, "num_selected": 3},
            {"kind": "multi_krum", "num_byzantine": 1, "num_selected": 3},
        ),
        ({"aggregator": "trimmed_mean", **PLAIN, "trim_ratio": 0.2}, {"kind": "trimmed_mean", "trim_ratio": 0.2}),
        ({"aggregator": "norm_clipped_mean", **PLAIN, "clip_norm": 2}, {"kind": "norm_clipped_mean", "clip_norm": 2.0}),
        (
            {"aggregator": "bulyan", **PLAIN, "num_byzantine": 1},
            {"kind": "bulyan", "num_byzantine": 1, "even_median": "element"},
        ),
        (
            {"aggregator": "bulyan", "num_byzantine": 1},  # before even_median could be chosen
            {"kind": "bulyan", "num_byzantine": 1, "even_median": "midpoint"},
        ),
        ({"aggregator": "geometric_median", **PLAIN}, {"kind": "geometric_median", "weighted": True}),
        (
            {"aggregator": "geometric_median", **PLAIN, "weighted_median": False},
            {"kind": "geometric_median", "weighted": False},
        ),
        ({"aggregator": "geometric_median"}, {"kind": "geometric_median", "weighted": False}),  # as for bulyan above
        ({"aggregator": "rules:largest", **PLAIN}, "rules:largest"),
        ({}, "mean"),
    ],
)
def test_the_flat_fields_of_a_job_of_an_earlier_version_keep_their_meaning(
    kind: type[AveragingRecipe], flat: dict[str, Any], today: Any
) -> None:
    recorded = kind.recorded({"name": "old", **flat})
    assert recorded["aggregator"] == today and recorded["name"] == "old"
    assert recorded.keys() - {"name"} <= kind.model_fields.keys()
    assert kind.recorded(recorded) == recorded


def test_the_form_of_a_deployment_offers_every_aggregator() -> None:
    schema: dict[str, Any] = parameter_schema(deployed(FedAvgRecipe)).model_dump_for_openapi()
    is_valid_schema(schema)
    field = schema["properties"]["aggregator"]
    assert field["default"] == "mean" and "such as Krum" in field["description"]
    name, *others = field["anyOf"]
    assert name["type"] == "string" and "mean, median, geometric_median" in name["description"]
    assert {entry["$ref"].rpartition("/")[2] for entry in others} == {
        *("Mean", "Median", "Krum", "MultiKrum", "Bulyan", "TrimmedMean", "GeometricMedian", "NormClippedMean")
    }
    krum = schema["definitions"]["Krum"]
    assert krum["properties"]["kind"]["const"] == "krum" and krum["required"] == ["num_byzantine"]
    assert krum["properties"]["num_byzantine"]["minimum"] == 1
    assert "number of updates of a round that may be arbitrary" in krum["properties"]["num_byzantine"]["description"]


@pytest.mark.parametrize(
    "given", ["median", {"kind": "trimmed_mean", "trim_ratio": 0.2}, "fedpool.tasks.robust:median"]
)
def test_a_run_of_a_deployment_changes_the_aggregator_of_its_template(
    recipe: Callable[..., FedAvgRecipe], tmp_path: Path, given: Any
) -> None:
    store = Store(tmp_path / "store")
    stage(recipe(aggregator=Krum(num_byzantine=1)), "template", store, SITES, template=True)
    template = recipe_of("template", store)
    parameters = template.model_dump(mode="json", include=set(form_fields(FedAvgRecipe)))
    assert parameters["aggregator"] == {"kind": "krum", "num_byzantine": 1}
    changed = template.revise(**{**parameters, "aggregator": given})
    assert isinstance(changed, FedAvgRecipe) and written(changed.rule) == given
    with pytest.raises(RecipeError, match="needs 11 updates"):
        template.revise(min_clients=10, aggregator={"kind": "bulyan", "num_byzantine": 2})


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        ("median", True),
        ("rules:largest", True),
        ({"kind": "median"}, True),
        ({"kind": "krum", "num_byzantine": 2}, True),
        ({"kind": "multi_krum", "num_byzantine": 2, "num_selected": None}, True),
        ({"kind": "krum", "num_byzantine": 0}, False),
        ({"kind": "krum"}, False),
        ({"kind": "median", "num_byzantine": 2}, False),
        ({"kind": "mode"}, False),
        (3, False),
    ],
)
def test_the_server_checks_a_runs_aggregator_by_the_form(given: Any, fits: bool) -> None:
    schema = parameter_schema(deployed(FedAvgRecipe)).model_dump_for_openapi()
    assert (validate({"aggregator": given}, schema, ignore_required=False) == []) is False  # other fields are required
    (field,) = ({"type": "object", "properties": {"aggregator": schema["properties"]["aggregator"]}},)
    assert (validate({"aggregator": given}, {**field, "definitions": schema["definitions"]}) == []) is fits
