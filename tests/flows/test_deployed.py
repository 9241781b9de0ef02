"""A recipe as a deployment: its form, and how a staged job becomes a recipe again."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from fedpool import ConfigError, CrossSiteEvalRecipe, FedAvgRecipe, FedEvalRecipe, IntegrityError, RecipeError, Store
from fedpool.deployments.remote_checks import probe
from fedpool.deployments.schedules import parse_schedule
from fedpool.errors import StoreError
from fedpool.flows.deployed import form_fields
from fedpool.flows.entrypoints import cross_site, fedavg, fedeval
from fedpool.flows.staging import restore, stage
from fedpool.flows.stored import recipe_of
from fedpool.tensors import Digest


@pytest.fixture
def recipe(write_script: Callable[..., Path]) -> FedAvgRecipe:
    return FedAvgRecipe(
        name="deployed",
        min_clients=2,
        num_rounds=3,
        model={"w": np.arange(4, dtype=np.float32)},
        train_script=write_script("import helper\n"),
        train_args="--batch 8",
        per_site_config={"site-1": {"lr": 0.5}},
        exclude_vars=(),
        round_timeout=9.5,
    )


def test_the_form_has_the_recipes_fields_with_bounds_and_descriptions() -> None:
    schema = parameter_schema(fedavg).model_dump_for_openapi()
    properties = schema["properties"]
    assert set(form_fields(FedAvgRecipe)) <= set(properties)
    assert properties["num_rounds"] | {"position": 0} == {
        "description": "training rounds", "maximum": 100000, "minimum": 1, "position": 0, "title": "num_rounds", "type": "integer"
    }  # fmt: skip
    for name in form_fields(FedAvgRecipe):
        assert properties[name]["description"] == FedAvgRecipe.model_fields[name].description
    assert not {"model", "train_script", "name"} & set(properties)
    assert set(schema["required"]) == {"store", "sites", "min_clients", "num_rounds"}


@pytest.mark.parametrize("flow", [fedeval, cross_site])
def test_the_form_of_an_evaluation_does_not_ask_what_only_a_training_needs(flow: Any) -> None:
    schema = parameter_schema(flow).model_dump_for_openapi()
    assert set(schema["required"]) == {"store", "sites", "min_clients"}
    assert {"key_metric", "round_timeout", "seed"} <= set(schema["properties"])
    assert not {"num_rounds", "stop_cond", "exclude_vars", "cross_site_eval"} & set(schema["properties"])


@pytest.mark.parametrize("kind", [FedEvalRecipe, CrossSiteEvalRecipe])
def test_a_staged_evaluation_is_the_same_recipe_again(
    kind: type[FedEvalRecipe], write_script: Callable[..., Path], tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    recipe = kind(name="scored", min_clients=2, model={"w": np.zeros(3)}, train_script=write_script("pass"))
    stage(recipe, "job-1", store, ("site-1", "site-2"))
    again = recipe_of("job-1", store)
    assert isinstance(again, kind) and again.model_dump(mode="json") == recipe.model_dump(mode="json")
    assert again.revise(min_clients=1).min_clients == 1


def test_a_staged_job_is_the_same_recipe_again(recipe: FedAvgRecipe, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    digest = stage(recipe, "job-1", store, ("site-1", "site-2"))
    Path(recipe.train_script).unlink()  # the bundle takes its place
    again = restore(FedAvgRecipe, "job-1", store)
    assert again.model.digest == digest == recipe.model.digest
    assert again.client_job("x", Digest("0" * 64, 1)) == recipe.client_job("x", Digest("0" * 64, 1))
    assert again.model_dump(mode="json") == recipe.model_dump(mode="json")


def test_a_revised_recipe_is_checked_anew_and_keeps_its_script(recipe: FedAvgRecipe) -> None:
    revised = recipe.revise(num_rounds=7, train_args="--batch 9")
    assert revised.num_rounds == 7 and revised.client_job("x", Digest("0" * 64, 1)).arguments == ("--batch", "9")
    assert revised.bundle is recipe.bundle and revised.model is recipe.model and recipe.num_rounds == 3
    with pytest.raises(ValidationError, match="num_rounds"):
        recipe.revise(num_rounds=0)
    with pytest.raises(ValidationError, match="no_such_field"):
        recipe.revise(no_such_field=1)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda job: job["recipe"].update(type="Other"), RecipeError, "has a Other, not a FedAvgRecipe"),
        (lambda job: job.pop("client"), IntegrityError, "does not describe a job"),
        (lambda job: job["model"].update(sha256="0" * 64), IntegrityError, "differs from its manifest"),
    ],
)
def test_a_staged_job_that_was_tampered_with_is_refused(
    recipe: FedAvgRecipe, tmp_path: Path, damage: Callable[[dict[str, Any]], Any], error: type[Exception], words: str
) -> None:
    store = Store(tmp_path / "store")
    stage(recipe, "job-1", store, ("site-1", "site-2"))
    job = store.read_json("job-1/job.json")
    damage(job)
    (tmp_path / "store/job-1/job.json").unlink()
    store.write_json("job-1/job.json", job)
    with pytest.raises(error, match=words):  # at the latest when a job is staged from it
        stage(restore(FedAvgRecipe, "job-1", store), "job-2", store, ("site-1", "site-2"))
    assert not store.exists("job-2/job.json") and not store.exists("job-2/rounds/00000/global.safetensors")


@pytest.mark.parametrize("schedule", ["0 2 * * 0", "FREQ=WEEKLY;BYDAY=SU", timedelta(hours=6)])
def test_a_schedule_is_a_cron_line_a_rule_or_an_interval(schedule: str | timedelta) -> None:
    parsed = parse_schedule(schedule)
    assert schedule in (parsed.cron, parsed.rrule, parsed.interval)


@pytest.mark.parametrize("schedule", ["every sunday", "FREQ=NEVER", timedelta(0), timedelta(seconds=-1), "99 * * * *"])
def test_a_schedule_that_is_none_is_refused_with_what_would_do(schedule: str | timedelta) -> None:
    with pytest.raises(ConfigError, match="write a cron line"):
        parse_schedule(schedule)


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        probe(Store(tmp_path / "file" / "store"))
    probe(Store(tmp_path / "store"))
    assert list((tmp_path / "store").iterdir()) == []
