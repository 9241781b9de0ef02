"""What a job does next, as a function of its recipe and its committed rounds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import CrossSiteEvalRecipe, FedAvgRecipe, FedEvalRecipe
from fedpool.flows.plan import Step, asks_everyone, best_model, next_step, num_expected, unscored_best
from fedpool.recipe import Recipe
from fedpool.tasks.record import RoundRecord, SubmittedModel
from fedpool.tensors import Digest
from tests.records import record_of

SITES = ("site-1", "site-2")
Records = list[RoundRecord]


def a_round(number: int, task: str = "train", *, accuracy: float | None = None, **changes: Any) -> RoundRecord:
    return record_of(
        {
            "round": number,
            "task": task,
            "metrics": {} if accuracy is None else {"accuracy": accuracy},
            "accepted": [{"site": site} for site in SITES],
            "global": {"sha256": str(number) * 64, "size": number},
            **changes,
        }
    )


def submission(number: int, *owners: str, accuracy: float | None = None) -> RoundRecord:
    models = [{"owner": owner, "round": number, "sha256": owner * 8, "size": 1} for owner in owners]
    return a_round(number, "submit_model", accuracy=accuracy, models=models)


@pytest.fixture
def make(write_script: Callable[..., Path]) -> Callable[..., Recipe]:
    script = write_script("pass")

    def recipe(kind: type[Recipe] = FedAvgRecipe, **fields: Any) -> Recipe:
        defaults = {"num_rounds": 2} if kind is FedAvgRecipe else {}
        common = {"name": "plan", "model": {"w": np.zeros(1)}, "train_script": script, "min_clients": 2}
        return kind(**common | defaults | fields)

    return recipe


def steps_of(recipe: Recipe, records: Records) -> list[tuple[str, str] | None]:
    """The step for each recorded round, and for the round after them."""
    steps = [next_step(recipe, records[:number])[0] for number in range(len(records) + 1)]
    return [(step.task, step.owner) if step else None for step in steps]


def test_a_training_without_metrics_ends_with_its_last_round(make: Callable[..., Recipe]) -> None:
    assert steps_of(make(), [a_round(0), a_round(1)]) == [("train", "server"), ("train", "server"), None]


def test_with_metrics_the_last_model_is_scored(make: Callable[..., Recipe]) -> None:
    records = [a_round(0), a_round(1, accuracy=0.5), a_round(2, "evaluate")]
    assert steps_of(make(), records)[2:] == [("evaluate", "server"), None]


def test_without_a_final_evaluation_the_last_training_round_is_the_end(make: Callable[..., Recipe]) -> None:
    recipe = make(final_evaluation=False)
    records = [a_round(0, accuracy=0.5), a_round(1, accuracy=0.4)]
    assert steps_of(recipe, records)[2:] == [None]
    assert [num_expected(recipe, records[:number], 2) for number in range(3)] == [2, 2, 2]
    assert best_model(recipe, records) == 0  # among the scored models; the final one is not scored
    assert best_model(recipe, [a_round(0), a_round(1)]) == 2
    stopped = make(final_evaluation=False, num_rounds=9, stop_cond="accuracy >= 0.5")
    assert next_step(stopped, records[:1]) == (None, "accuracy >= 0.5 (it was 0.5 at the start of round 0)")


def test_across_sites_every_model_is_scored_that_is_not_scored_yet(make: Callable[..., Recipe]) -> None:
    records = [
        a_round(0),
        a_round(1),
        a_round(2, "evaluate"),
        submission(3, "server-best", "site-2"),
        a_round(4, "evaluate"),
        a_round(5, "evaluate"),
    ]
    recipe = make(cross_site_eval=True)
    assert steps_of(recipe, records)[2:] == [
        ("evaluate", "server"),
        ("submit_model", "server"),
        ("evaluate", "server-best"),
        ("evaluate", "site-2"),
        None,
    ]
    step, _ = next_step(recipe, records[:5])
    assert step == Step("evaluate", "site-2", 3, Digest("site-2" * 8, 1), everyone=True)


def test_without_a_submitted_model_the_job_ends(make: Callable[..., Recipe]) -> None:
    assert next_step(make(CrossSiteEvalRecipe), [a_round(0, "evaluate"), submission(1)]) == (None, None)


@pytest.mark.parametrize(("kind", "rest"), [(FedEvalRecipe, None), (CrossSiteEvalRecipe, ("submit_model", "server"))])
def test_without_training_the_first_round_scores_the_model_and_needs_answers(
    kind: type[Recipe], rest: tuple[str, str] | None, make: Callable[..., Recipe]
) -> None:
    recipe = make(kind)
    step, _ = next_step(recipe, [])
    assert step is not None and (step.task, step.min_answers) == ("evaluate", 2)
    assert steps_of(recipe, [a_round(0, "evaluate")])[1] == rest


def test_min_clients_is_a_matter_of_the_training(make: Callable[..., Recipe]) -> None:
    recipe = make(cross_site_eval=True)
    first, _ = next_step(recipe, [])
    scoring, _ = next_step(recipe, [a_round(0), a_round(1)])
    assert first is not None and first.min_answers == 2
    assert scoring is not None and scoring.min_answers == 0 and scoring.everyone


def test_a_training_that_is_stopped_goes_on_with_its_scores(make: Callable[..., Recipe]) -> None:
    recipe = make(num_rounds=9, stop_cond="accuracy >= 0.5", cross_site_eval=True)
    records = [a_round(0, accuracy=0.6)]
    step, stopped_by = next_step(recipe, records)
    assert step is not None and step.task == "evaluate" and stopped_by is not None
    assert num_expected(recipe, records, 2) == 1 + 1 + 1 + 2
    assert asks_everyone(recipe, records, 1) and not asks_everyone(recipe, records, 0)


def test_how_many_rounds_will_come_is_known_better_and_better(make: Callable[..., Recipe]) -> None:
    plain, across = make(), make(cross_site_eval=True)
    records: Records = [a_round(0), a_round(1, accuracy=0.5), a_round(2, "evaluate"), submission(3, "site-1")]
    assert [num_expected(plain, records[:number], 2) for number in range(3)] == [2, 2, 3]
    assert [num_expected(across, records[:number], 2) for number in range(5)] == [6, 6, 6, 6, 5]
    assert [num_expected(make(kind), [], 2) for kind in (FedEvalRecipe, CrossSiteEvalRecipe)] == [1, 4]


def test_the_best_model_is_one_of_the_servers(make: Callable[..., Recipe]) -> None:
    records: Records = [
        a_round(0, accuracy=0.2),
        a_round(1, accuracy=0.4),
        a_round(2, "evaluate", accuracy=0.3),
        submission(3, "site-1", accuracy=0.8),
        a_round(4, "evaluate", accuracy=0.9),
    ]
    assert best_model(make(cross_site_eval=True), records) == 1


def test_a_best_model_is_scored_anew_only_when_a_site_has_not_scored_it(make: Callable[..., Recipe]) -> None:
    recipe = make(cross_site_eval=True)
    records: Records = [a_round(0, accuracy=0.2), a_round(1, accuracy=0.4), a_round(2, "evaluate", accuracy=0.3)]
    assert unscored_best(recipe, records, SITES) is None
    entry = SubmittedModel(owner="server-best", round=1, sha256="1" * 64, size=1)
    assert unscored_best(recipe, records, (*SITES, "site-3")) == entry
    records[2] = a_round(2, "evaluate", accuracy=0.5)  # the final model is the best
    assert unscored_best(recipe, records, (*SITES, "site-3")) is None
