"""The round after training: scripts that don't check its task, sites that fail in it, and jobs
without it.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import CrossSiteEvalRecipe, FedAvgRecipe, FedEvalRecipe, Run
from fedpool.errors import RecipeError
from fedpool.flows.staging import check_unchanged, stage
from fedpool.flows.verify import verify_job
from fedpool.store import Store

# A training script that has a budget for its rounds and never checks the task, like many scripts
# written for NVFlare.
ASKS_NOTHING = """
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        assert model.current_round < model.total_rounds, (model.current_round, model.total_rounds)
        params = {name: value + 1 for name, value in model.params.items()}
        flare.send(flare.FLModel(params=params, metrics={"accuracy": float(model.params["w"][0]) / 10}))
"""

FAILS = """
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        if flare.is_evaluate():
            FAULT
        flare.send(flare.FLModel(params={"w": model.params["w"] + 1}, metrics={"accuracy": 0.5}))
"""

FAULTS = {
    "raises": ('raise ValueError("no test set")', "site-2 failed: the script ended with exit code 1"),
    "continues": (
        "continue",
        "ClientError: round 2 at site-1: send() was not called before the next flare.is_running()",
    ),
    "has no metrics": ("flare.send(flare.FLModel(metrics={})); continue", "and no site sent metrics"),
    "has no number": (
        'flare.send(flare.FLModel(metrics={"accuracy": float("nan")})); continue',
        "no site sent metrics",
    ),
}


def result_json(run: Run) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((Path(run.path) / "result.json").read_text())
    return result


def verify(run: Run) -> None:
    folder = Path(run.path)
    assert verify_job(Store(str(folder.parent)), folder.name).status == "COMPLETED"


def test_a_script_that_does_not_ask_is_scored_and_told_once_at_each_site(
    run_job: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        result = run_job(ASKS_NOTHING).get_result()
    assert [metrics["accuracy"] for metrics in result.metrics] == [0, 0.1, 0.2]
    assert result.evaluation_error is None
    told = [line for line in caplog.messages if "the parameters that were sent are ignored" in line]
    assert sorted(line.split(":")[0] for line in told) == ["site-1", "site-2"]
    assert all("round 2 at site-" in line for line in told)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_evaluation_is_named_in_the_result_and_costs_nothing_else(
    fault: str, run_job: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    code, cause = FAULTS[fault]
    run = run_job(FAILS.replace("FAULT", code))
    result = run.get_result()
    assert [metrics["accuracy"] for metrics in result.metrics] == [0.5, 0.5]
    assert result.evaluation_error is not None
    assert result.evaluation_error.startswith("round 2 was to score the final model, and no site sent metrics")
    assert cause in result.evaluation_error
    assert (result.best_round, result.num_rounds) == (0, 2)
    assert result_json(run)["evaluation_error"] == result.evaluation_error
    assert cause in caplog.text
    verify(run)


def test_a_site_that_fails_alone_leaves_the_others_scores(run_job: Callable[..., Run]) -> None:
    code = """assert flare.get_site_name() == "site-1", "no test set"
            flare.send(flare.FLModel(metrics={"accuracy": 1})); continue"""
    result = run_job(FAILS.replace("FAULT", code)).get_result()
    assert result.metrics[-1] == {"accuracy": 1}
    assert result.evaluation_error is None
    assert [entry["site"] for entry in result.rounds[-1]["failed"]] == ["site-2"]


def test_a_job_without_it_ends_with_its_last_training_round(run_job: Callable[..., Run]) -> None:
    run = run_job(ASKS_NOTHING, final_evaluation=False)
    result = run.get_result()
    assert [record["task"] for record in result.rounds] == ["train", "train"]
    assert [metrics["accuracy"] for metrics in result.metrics] == [0, 0.1]
    assert (result.best_round, result.num_rounds, result.evaluation_error) == (1, 2, None)
    assert result.params["w"].tolist() == [2, 2, 2]
    assert result.best_params["w"].tolist() == [1, 1, 1]
    assert result_json(run)["evaluation_error"] is None
    verify(run)


def test_without_any_metrics_there_is_no_empty_one_either(run_job: Callable[..., Run]) -> None:
    result = run_job().get_result()
    assert (result.metrics, result.best_round, result.evaluation_error) == ([], 2, None)


@pytest.mark.parametrize("kind", [FedEvalRecipe, CrossSiteEvalRecipe])
def test_where_nothing_is_trained_it_cannot_be_left_out(kind: Any, write_script: Callable[..., Path]) -> None:
    common = {"name": "a", "min_clients": 1, "model": {"w": np.zeros(1)}, "train_script": write_script("pass")}
    with pytest.raises(ValueError, match="final_evaluation"):
        kind(**common, final_evaluation=False)


def test_it_cannot_be_left_out_of_a_cross_site_evaluation(write_script: Callable[..., Path]) -> None:
    common: dict[str, Any] = {"name": "a", "min_clients": 1, "num_rounds": 1, "model": {"w": np.zeros(1)}}
    with pytest.raises(
        ValueError, match="cross_site_eval includes the final evaluation: leave out final_evaluation=False"
    ):
        FedAvgRecipe(**common, train_script=write_script("pass"), cross_site_eval=True, final_evaluation=False)


def test_a_job_from_before_there_was_the_field_goes_on_with_its_default(
    tmp_path: Path, write_script: Callable[..., Path]
) -> None:
    recipe = FedAvgRecipe(
        name="old", min_clients=1, num_rounds=1, model={"w": np.zeros(1)}, train_script=write_script("pass")
    )
    store = Store(str(tmp_path / "runs"))
    stage(recipe, "old-1", store, ("site-1",))
    described = tmp_path / "runs" / "old-1" / "job.json"
    job = json.loads(described.read_text())
    for name in ("final_evaluation", "config"):
        del job["recipe"][name]
    described.write_text(json.dumps(job))
    check_unchanged(recipe, "old-1", store, ["site-1"])
    with pytest.raises(RecipeError, match="final_evaluation: True in the job, False here"):
        check_unchanged(recipe.revise(final_evaluation=False), "old-1", store, ["site-1"])
