"""CONTRIBUTING.md's filter, in a user's folder: every environment runs, names and undoes it."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from fedpool import FedAvgRecipe, JobFailed, PocEnv, ProdEnv, SimEnv, Store
from fedpool.allowed_code import VARIABLE
from fedpool.flows.replay import replay_round
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from tests.algorithms import models_of
from tests.own_algorithm import importable, write_filter
from tests.poc import Worker, brought_up

SITES = ("site-1", "site-2")
NAMED = [{"type": "scaling:Scaling", "factor": 8.0}]


class Scaled:
    """The user's folder, which is on sys.path: client.py, scaling.py, job.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def recipe(self, **fields: Any) -> FedAvgRecipe:
        importlib.invalidate_caches()
        filters = [importlib.import_module("scaling").Scaling(factor=8)]
        defaults: dict[str, Any] = {
            "name": "scaled",
            "min_clients": 2,
            "num_rounds": 2,
            "site_retries": 0,
            "model": {"w": np.zeros(3)},
            "train_script": str(self.folder / "client.py"),
            "filters": filters,
        }
        return FedAvgRecipe(**defaults | fields)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scaled]:
    with importable(write_filter(tmp_path_factory.mktemp("scaled"))) as folder:
        yield Scaled(folder)


@pytest.fixture(scope="module")
def simulated(scaled: Scaled, prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a simulated job that has ended."""
    workspace = tmp_path_factory.mktemp("simulated")
    done = scaled.recipe().execute(SimEnv(workspace=workspace, progress=False))
    assert done.get_result().params["w"].tolist() == [2, 2, 2]
    return workspace / done.job_id


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PocEnv]:
    with brought_up(PocEnv(clients=SITES, home=tmp_path_factory.mktemp("poc"), progress=False)) as env:
        yield env


def assert_filtered(store: Store, job_id: str) -> None:
    """Each stored update is eight times the trained one; manifests and records name the filter, and
    verification undoes it.
    """
    paths = JobPaths(job_id)
    for round in range(2):
        assert store.read_json(paths.record(round))["filters"] == NAMED
        for site in SITES:
            manifest = store.read_json(paths.manifest(round, site))
            assert manifest["filters"] == NAMED
            travelled = load(store.read_bytes(paths.update(round, site)))
            assert travelled["w"].tolist() == [8 * (round + 1)] * 3
    assert verify_job(store, job_id).num_updates == 4


def test_in_simulation_it_is_named_verified_and_replayed(simulated: Path, tmp_path: Path) -> None:
    store = Store(simulated.parent)
    assert_filtered(store, simulated.name)
    assert replay_round(store, simulated.name, tmp_path / "again.safetensors").distance == 0


def test_what_the_filter_undoes_gives_the_bytes_of_a_job_without_it(
    scaled: Scaled, simulated: Path, prefect_api: str, tmp_path: Path
) -> None:
    plain = scaled.recipe(filters=()).execute(SimEnv(workspace=tmp_path, progress=False))
    assert models_of(Store(tmp_path), plain.job_id) == models_of(Store(simulated.parent), simulated.name)


def test_a_proof_of_concept_runs_it_at_its_sites(env: PocEnv, scaled: Scaled, simulated: Path) -> None:
    done = scaled.recipe().execute(env)
    done.get_result(300)
    assert_filtered(env.open_store(), done.job_id)
    assert models_of(env.open_store(), done.job_id) == models_of(Store(simulated.parent), simulated.name)


@pytest.mark.slow
def test_in_production_a_site_runs_what_its_operator_allows(
    env: PocEnv, scaled: Scaled, simulated: Path, tmp_path: Path
) -> None:
    store = env.open_store()
    prod = ProdEnv(api_url=env.api_url, store=store.url, sites=("strict",), coordinator_pool="open", progress=False)
    start = ("fedpool.cli", "coordinator", "start", "--pool", "open")
    own = ("--name", "strict", "--folder", str(tmp_path / "site"), "--store", store.url)
    site = ("fedpool.cli", "site", "start", *own)
    coordinator = Worker(env.api_url, tmp_path / "open", *start, **{VARIABLE: "any"}).wait_until_started()
    try:
        strict = Worker(env.api_url, tmp_path / "strict", *site, **{VARIABLE: "none"}).wait_until_started()
        try:
            refused = scaled.recipe(min_clients=1).execute(prod)
            with pytest.raises(
                JobFailed, match=r"(?s)scaling:Scaling.*Site strict does not allow it: .*FEDPOOL_ALLOWED_CODE="
            ) as failed:
                refused.get_result(300)
        finally:
            strict.end()
        sha256 = str(failed.value).partition(f"{VARIABLE}=")[2][:64]
        allowed = Worker(env.api_url, tmp_path / "allowed", *site, **{VARIABLE: sha256}).wait_until_started()
        try:
            done = scaled.recipe(min_clients=1).execute(prod)
            assert done.get_result(300).params["w"].tolist() == [2, 2, 2]
            verify_job(store, done.job_id)
        finally:
            allowed.end()
    finally:
        coordinator.end()
