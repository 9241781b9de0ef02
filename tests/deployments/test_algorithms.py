"""Every algorithm as users run it: the example's recipes and clients run, are verified, and are
killed and resumed.
"""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import JobFailed, RecipeError, Run, ScaffoldRecipe, SimEnv
from fedpool.arrays import load_arrays
from fedpool.errors import IntegrityError
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.store import Store
from tests.algorithms import ALGORITHMS, EXAMPLE, FOLDER, models_of, recipe_of


def store_of(run: Run) -> Store:
    return Store(Path(run.path).parent)


@pytest.fixture
def env(prefect_api: str, tmp_path: Path) -> SimEnv:
    return SimEnv(num_clients=3, workspace=tmp_path / "runs", progress=False)


@pytest.fixture(scope="module")
def done(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Returns an algorithm's undisturbed job of three rounds, which runs on the first request."""
    env = SimEnv(num_clients=3, workspace=tmp_path_factory.mktemp("done"), progress=False)
    return cache(lambda name: recipe_of(name, 3).execute(env))


# Slow: the other algorithms cover their code, and importing torch takes most of their time.
COVERED = ("diloco", "fedavg", "fedprox", "median")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in COVERED else ()) for name in ALGORITHMS]
)
def test_it_runs_and_its_record_is_verified_to_the_byte(name: str, done: Callable[[str], Run]) -> None:
    run = done(name)
    result, store = run.get_result(), store_of(run)
    assert all(np.isfinite(value.numpy()).all() for value in result.params.values())
    assert result.num_rounds == 3 and result.metrics[-1]["accuracy"] > 0.4
    assert verify_job(store, run.job_id).num_rounds == 4
    states = [store.exists(JobPaths(run.job_id).state(number)) for number in range(4)]
    assert states == [name in ("fedadam", "diloco", "scaffold")] * 3 + [False]


@pytest.mark.parametrize("name", ["ditto", "fedbn", "scaffold"])
def test_what_a_site_keeps_stays_there_and_two_rounds_of_it_at_most(name: str, done: Callable[[str], Run]) -> None:
    run = done(name)
    what = {"ditto": "personal", "fedbn": "excluded", "scaffold": "control"}[name]
    kept = Path(store_of(run).full(JobPaths(run.job_id).kept("site-2")))
    assert sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*.safetensors")) == [
        f"00001/{what}.safetensors",
        f"00002/{what}.safetensors",
    ]
    if name == "fedbn":
        names = set(load_arrays(kept / "00002/excluded.safetensors", "numpy"))
        assert names == {
            f"norm.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        }
        first, last = (load_arrays(run.path + f"/rounds/0000{n}/global.safetensors", "numpy") for n in (0, 3))
        assert all(np.array_equal(first[key], last[key]) for key in names)  # those of the global model never change


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import job
from fedpool import SimEnv
env = SimEnv(num_clients=3, workspace={runs!r}, progress=False)
job.recipe({name!r}, 3).execute(env)
"""


BEFORE_COMMIT, BETWEEN_MANIFESTS = (
    ("rounds/00001/round\\.json", "before"),
    ("rounds/00002/sites/[^/]+/update\\.json", "after"),
)


@pytest.mark.parametrize(
    ("name", "pattern", "when"),
    [
        ("scaffold", *BETWEEN_MANIFESTS),
        *[pytest.param(name, *BEFORE_COMMIT, marks=pytest.mark.slow) for name in ("scaffold", "ditto", "fedadam")],
        *[pytest.param(name, *BETWEEN_MANIFESTS, marks=pytest.mark.slow) for name in ("fedadam", "ditto")],
    ],
)
def test_killed_it_goes_on_with_its_state_to_the_same_bytes(
    name: str,
    pattern: str,
    when: str,
    env: SimEnv,
    done: Callable[[str], Run],
    prefect_api: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    script, runs = tmp_path / "killed.py", tmp_path / "killed"
    script.write_text(SCRIPT.format(folder=str(FOLDER), runs=str(runs), name=name))
    kill = [sys.executable, "-m", "fedpool.testing", "--at", pattern, "--when", when, str(script)]
    assert subprocess.run(kill, cwd=tmp_path).returncode == -signal.SIGKILL
    store = Store(runs)
    (job_id,) = [found for found in store.names("") if found.startswith(f"{name}-")]
    recipe_of(name, 3).execute(env.model_copy(update={"workspace": runs}), resume=job_id).get_result()
    assert models_of(store, job_id) == models_of(store_of(done(name)), done(name).job_id)
    verify_job(store, job_id)


def test_a_flipped_byte_in_the_state_is_found(done: Callable[[str], Run], tmp_path: Path) -> None:
    run = done("fedadam")
    shutil.copytree(run.path, tmp_path / run.job_id)
    store, paths = Store(tmp_path), JobPaths(run.job_id)
    state = Path(store.full(paths.state(1)))
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.chmod(0o644)
    state.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"rounds/00001/state\.safetensors"):
        verify_job(store, run.job_id)


@pytest.mark.slow
def test_the_states_of_old_rounds_go_with_their_updates(env: SimEnv, tmp_path: Path) -> None:
    run = recipe_of("fedadam", 3).revise(keep_updates="none").execute(env)
    store, paths = Store(tmp_path / "runs"), JobPaths(run.job_id)
    assert [store.exists(paths.state(number)) for number in range(3)] == [False, False, True]
    assert verify_job(store, run.job_id).num_pruned == 9


def test_a_script_that_sends_no_control_variates_is_told_what_is_missing(run_job: Callable[..., Run]) -> None:
    with pytest.raises(JobFailed, match=r"missing_extras.*FLModel.extras\['control'\]"):
        run_job(kind=ScaffoldRecipe).get_result()


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("FedOptRecipe", {"server_optimizer": "sgdd"}, "server_optimizer 'sgdd' is unknown"),
        ("FedOptRecipe", {"server_optimizer": "torch.optim.LBFGS"}, "torch.optim.LBFGS"),
        ("FedOptRecipe", {"server_optimizer": "torch.optim.NAdam"}, "keeps 'mu_product'"),
        ("FedOptRecipe", {"server_optimizer": "torch.optim.Nope"}, "cannot be used"),
        (
            "FedOptRecipe",
            {"server_optimizer": "torch.optim.Adam", "server_optimizer_args": {"nope": 1}},
            "cannot be used",
        ),
        ("FedOptRecipe", {"server_optimizer_args": {"eps": 1}}, "are for a class of torch.optim"),
        ("FedOptRecipe", {"server_scheduler": "ReduceLROnPlateau"}, "steps without a metric"),
        ("FedOptRecipe", {"server_scheduler": "Nope"}, "server_scheduler 'Nope'"),
        ("FedOptRecipe", {"server_lr": 0}, "greater than 0"),
        ("FedProxRecipe", {}, "fedprox_mu"),
        ("FedProxRecipe", {"fedprox_mu": -1}, "greater than or equal to 0"),
        ("CyclicRecipe", {"order": "up"}, "use 'fixed', 'random', or a list of sites"),
        ("CyclicRecipe", {"order": []}, "names no site"),
        ("CyclicRecipe", {"clients_per_round": 2}, "each round of cyclic weight transfer has one site"),
        ("FedBNRecipe", {}, "FedBN needs batch normalisation"),
        ("FedAvgRecipe", {"aggregator": "krum"}, '"krum" needs num_byzantine: Krum(num_byzantine=...)'),
        ("FedAvgRecipe", {"aggregator": lambda values, weights: values[0]}, "put it into a module"),
    ],
)
def test_what_cannot_work_is_refused_when_the_recipe_is_built(kind: str, fields: dict[str, Any], message: str) -> None:
    import fedpool

    given = {"name": "x", "num_rounds": 1, "model": {"w": np.zeros(2, np.float32)}, "train_script": FOLDER / "plain.py"}
    given |= {} if kind == "CyclicRecipe" else {"min_clients": 2}
    with pytest.raises((ValueError, RecipeError)) as caught:
        getattr(fedpool, kind)(**given | fields)
    assert message in str(caught.value)


def test_cyclic_refuses_an_order_with_sites_that_are_not_there(env: SimEnv) -> None:
    with pytest.raises(RecipeError, match="order names site-9, but the sites are site-1"):
        recipe_of("cyclic").revise(order=["site-1", "site-9"]).execute(env)


def test_each_round_of_a_cyclic_job_is_one_sites(done: Callable[[str], Run]) -> None:
    *trained, last = done("cyclic").get_result().rounds
    assert sorted(record["sites"] for record in trained) == [["site-1"], ["site-2"], ["site-3"]]
    assert last["sites"] == ["site-1", "site-2", "site-3"]  # all sites score the final model


def test_no_client_of_the_example_is_longer_than_60_lines() -> None:
    for script in {entry[1] for entry in EXAMPLE.ALGORITHMS.values()}:
        assert len((FOLDER / script).read_text().splitlines()) <= 60, script
