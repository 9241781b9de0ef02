"""Custom environments and regions take one file (`tests/own_environment.py`)."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from fedpool import FedAvgRecipe
from fedpool.errors import RecipeError
from fedpool.flows.verify import verify_job
from fedpool.sites.session import Session
from fedpool.store import Store
from tests.own_environment import FunctionSession, Params, Region, SessionEnv

ROUNDS = 2


@pytest.fixture
def recipe(write_script: Callable[..., Path]) -> Callable[[int], FedAvgRecipe]:
    script = write_script("raise SystemExit('no site of these runs a script')")

    def make(num_sites: int) -> FedAvgRecipe:
        return FedAvgRecipe(
            name="functions",
            min_clients=num_sites,
            num_rounds=ROUNDS,
            model={"w": np.arange(5, dtype=np.float64), "b": np.ones((2, 3))},
            train_script=script,
            final_evaluation=False,
        )

    return make


def site(seed: int, weight: float) -> FunctionSession:
    """A site that pulls the model towards its own optimum."""
    rng = np.random.default_rng(seed)
    optimum = {"w": rng.normal(size=5), "b": rng.normal(size=(2, 3))}

    def train(model: Params) -> Params:
        return {name: value + 0.5 * (optimum[name] - value) for name, value in model.items()}

    return FunctionSession(train, weight)


SITES: Mapping[str, Session] = {"a": site(0, 3.0), "b": site(1, 1.0), "c": site(2, 40.0), "d": site(3, 0.25)}


def test_a_job_in_an_environment_of_ones_own_is_verified_like_any_other(
    tmp_path: Path, prefect_api: str, recipe: Callable[[int], FedAvgRecipe]
) -> None:
    run = recipe(len(SITES)).execute(env=SessionEnv(SITES, tmp_path))
    result = run.get_result()
    assert [entry["weight"] for entry in result.rounds[-1]["accepted"]] == [3.0, 1.0, 40.0, 0.25]
    verified = verify_job(Store(tmp_path), run.job_id)
    assert (verified.status, verified.num_rounds) == ("COMPLETED", ROUNDS)


def test_a_region_answers_as_one_site_with_the_mean_and_the_weight_of_its_own(
    tmp_path: Path, prefect_api: str, recipe: Callable[[int], FedAvgRecipe], write_script: Callable[..., Path]
) -> None:
    flat = recipe(len(SITES)).execute(env=SessionEnv(SITES, tmp_path / "flat")).get_result()
    script = write_script("raise SystemExit('nor do these')", "region.py")
    regions: dict[str, Session] = {
        name: Region(name, {site: SITES[site] for site in sites}, tmp_path / name, script)
        for name, sites in {"north": "ab", "south": "cd"}.items()
    }
    run = recipe(len(regions)).execute(env=SessionEnv(regions, tmp_path / "above"))
    result = run.get_result()
    assert {entry["site"]: entry["weight"] for entry in result.rounds[-1]["accepted"]} == {"north": 4.0, "south": 40.25}
    for name, expected in flat.params.items():
        np.testing.assert_allclose(result.params[name], expected, rtol=0, atol=1e-12)
    assert verify_job(Store(tmp_path / "above"), run.job_id).num_rounds == ROUNDS


def test_a_site_too_few_is_refused_before_the_job_begins(
    tmp_path: Path, prefect_api: str, recipe: Callable[[int], FedAvgRecipe]
) -> None:
    with pytest.raises(RecipeError, match="min_clients"):
        recipe(len(SITES) + 1).execute(env=SessionEnv(SITES, tmp_path))
    assert list(tmp_path.glob("functions-*")) == []
