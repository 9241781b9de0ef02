"""CONTRIBUTING.md's algorithm, in a user's folder, gives the same bytes in every environment."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from fedpool import FedAvgRecipe, JobFailed, PocEnv, ProdEnv, Recipe, RecipeError, SimEnv, Store
from fedpool.allowed_code import VARIABLE
from fedpool.cli import main
from fedpool.deployments.stored_jobs import list_jobs
from fedpool.flows.replay import replay_round
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from tests.algorithms import models_of
from tests.own_algorithm import importable, run, write_algorithm
from tests.poc import Worker, brought_up, prefect

SITES = ("site-1", "site-2")
COMMAND = ("-m", "fedpool.cli", "job")


class Algorithm:
    """The user's folder, which is on sys.path: client.py, partial_step.py, job.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def kind(self) -> type[Recipe]:
        importlib.invalidate_caches()
        kind: type[Recipe] = importlib.import_module("partial_step").PartialStepRecipe
        return kind

    def recipe(self, kind: type[Recipe] | None = None, **fields: Any) -> Recipe:
        defaults: dict[str, Any] = {"name": "partial", "min_clients": 2, "num_rounds": 2, "model": {"w": np.zeros(3)}}
        script = {"train_script": str(self.folder / "client.py")}
        own = {} if kind else {"server_lr": 0.5}
        return (kind or self.kind())(**defaults | script | own | fields)


@pytest.fixture(scope="module")
def algorithm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Algorithm]:
    with importable(write_algorithm(tmp_path_factory.mktemp("partial"))) as folder:
        yield Algorithm(folder)


@pytest.fixture(scope="module")
def simulated(algorithm: Algorithm, prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a simulated job that has ended."""
    workspace = tmp_path_factory.mktemp("simulated")
    done = algorithm.recipe().execute(SimEnv(workspace=workspace, progress=False))
    assert done.get_result().params["w"].tolist() == [1, 1, 1]
    return workspace / done.job_id


def lost(job: Path) -> None:
    """Delete a job's result and last commit, as if its process had been killed before them."""
    for path in job.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    for name in ("result.json", "rounds/00001/round.json", "rounds/00002/global.safetensors"):
        (job / name).unlink()


@pytest.fixture
def job(simulated: Path, tmp_path: Path) -> Path:
    """A copy of the simulated job, for the test to change."""
    return Path(shutil.copytree(simulated, tmp_path / "runs" / simulated.name))


def hash_of(job: Path) -> str:
    sha256: str = Store(job.parent).read_json(JobPaths(job.name).job)["code"]["sha256"]
    return sha256


def test_in_simulation_it_verifies_and_replays_in_the_process_that_has_the_class(
    simulated: Path, tmp_path: Path
) -> None:
    store = Store(simulated.parent)
    assert verify_job(store, simulated.name).num_updates == 4
    assert replay_round(store, simulated.name, tmp_path / "again.safetensors").distance == 0


@pytest.mark.parametrize("command", ["verify", "replay"])
def test_the_commands_run_its_code_once_they_may(job: Path, tmp_path: Path, command: str) -> None:
    words = (*COMMAND, command, job.name, "--store", str(job.parent))
    allowed = run(tmp_path, *words, "--allow-code", hash_of(job))
    assert allowed.returncode == 0, allowed.stdout
    assert ("2 rounds and 4 updates verified" if command == "verify" else "this model is 0 from") in allowed.stdout


def test_a_command_that_nobody_can_answer_says_how_to_allow_the_code(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(*options: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["job", "verify", job.name, "--store", str(job.parent), *options])
        assert ended.value.code == 1
        return capsys.readouterr().err

    monkeypatch.delitem(sys.modules, "partial_step")
    refused = verify()
    assert f"partial_step:PartialStepRecipe (partial_step.py), sha256 {hash_of(job)}" in refused
    assert f"add --allow-code {hash_of(job)}" in refused and "partial_step" not in sys.modules
    assert "--allow-code has 'partial_step.py': give sha256 hashes" in verify("--allow-code", "partial_step.py")
    assert "add --allow-code" in verify("--allow-code", "0" * 64)


def test_a_job_that_was_lost_goes_on_from_job_py(algorithm: Algorithm, job: Path, prefect_api: str) -> None:
    expected = models_of(Store(job.parent), job.name)
    lost(job)
    algorithm.recipe().execute(SimEnv(workspace=job.parent, progress=False), resume=job.name).get_result()
    assert models_of(Store(job.parent), job.name) == expected


def test_a_job_that_was_lost_goes_on_by_the_command(job: Path, prefect_api: str, tmp_path: Path) -> None:
    expected = models_of(Store(job.parent), job.name)
    lost(job)
    words = (*COMMAND, "resume", job.name, "--store", str(job.parent))
    refused = run(tmp_path, *words, PREFECT_API_URL=prefect_api)
    assert refused.returncode == 1 and f"add --allow-code {hash_of(job)}" in refused.stdout
    done = run(tmp_path, *words, "--allow-code", hash_of(job), PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stdout
    assert models_of(Store(job.parent), job.name) == expected


def test_a_changed_class_does_not_go_on_with_the_job(algorithm: Algorithm, job: Path, tmp_path: Path) -> None:
    lost(job)
    changed = write_algorithm(tmp_path / "changed")
    file = changed / "partial_step.py"
    file.write_text(file.read_text().replace("w <- w + lr (mean - w)", "the same in other words"))
    (changed / "job.py").write_text(
        (changed / "job.py")
        .read_text()
        .replace("SimEnv())", f"SimEnv(workspace={str(job.parent)!r}), resume={job.name!r})")
    )
    done = run(changed, "job.py")
    assert done.returncode == 1
    assert f"\ncode: {hash_of(job)} in the job, " in done.stdout and "fork it (fork=True) to change" in done.stdout


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_person_at_a_terminal_is_asked(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str
) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return f"{answer}\n"

    loaded = sys.modules.pop("partial_step")
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    before = list(sys.path)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["job", "verify", job.name, "--store", str(job.parent)])
    finally:
        sys.path[:] = before
        sys.modules["partial_step"] = loaded
    asked = capsys.readouterr().err
    assert "partial_step:PartialStepRecipe (partial_step.py)" in asked and "Run it here? [y/N] " in asked
    assert ended.value.code in ((0, None) if answer == "y" else (1,))
    assert (f"the code of job {job.name} was not run" in asked) == (answer == "n")


def in_job_py(folder: Path) -> Path:
    """Write the same algorithm with its class in job.py itself."""
    write_algorithm(folder)
    script = (folder / "job.py").read_text().replace("from partial_step import PartialStepRecipe\n", "")
    (folder / "job.py").write_text((folder / "partial_step.py").read_text() + script)
    (folder / "partial_step.py").unlink()
    return folder


def test_a_class_in_job_py_runs_in_simulation_with_a_note(prefect_api: str, tmp_path: Path) -> None:
    done = run(in_job_py(tmp_path), "job.py", PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stdout
    assert (
        done.stdout.count("class PartialStepRecipe is defined in the script itself: put it into a module beside") == 1
    )
    (job,) = list_jobs(Store(tmp_path / "fedpool-runs"))
    assert job.recipe == "PartialStepRecipe"
    verified = run(tmp_path, *COMMAND, "verify", job.job_id, "--store", str(tmp_path / "fedpool-runs"))
    assert verified.returncode == 1
    assert "class PartialStepRecipe, which the script that ran the job defines itself" in verified.stdout
    assert "put it into a module beside the script, and run the job again" in verified.stdout


@pytest.mark.parametrize("how", ["execute(env=env)", "deploy(env=env)"])
def test_a_class_in_job_py_is_refused_by_a_proof_of_concept_before_it_comes_up(tmp_path: Path, how: str) -> None:
    folder = in_job_py(tmp_path / "folder")
    script = (folder / "job.py").read_text().partition("if __name__")[0].replace("SimEnv", "PocEnv")
    (folder / "job.py").write_text(f"{script}\nenv = PocEnv(home={str(tmp_path / 'poc')!r})\nrecipe.{how}\n")
    done = run(folder, "job.py")
    assert (
        done.returncode == 1 and "RecipeError: class PartialStepRecipe is defined in the script itself" in done.stdout
    )
    assert not (tmp_path / "poc").exists()


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PocEnv]:
    with brought_up(PocEnv(clients=SITES, home=tmp_path_factory.mktemp("poc"), progress=False)) as env:
        yield env


def test_a_proof_of_concept_gives_the_same_bytes_and_goes_on_with_a_job_that_was_lost(
    env: PocEnv, algorithm: Algorithm, simulated: Path
) -> None:
    expected = models_of(Store(simulated.parent), simulated.name)
    done = algorithm.recipe().execute(env)
    done.get_result(300)
    store = env.open_store()
    assert models_of(store, done.job_id) == expected
    assert verify_job(store, done.job_id).status == "COMPLETED"
    lost(Path(done.path))
    algorithm.recipe().execute(env, resume=done.job_id).get_result(300)
    assert models_of(store, done.job_id) == expected


@pytest.mark.slow
def test_a_deployment_has_its_fields_in_the_form_and_each_run_is_a_job_of_it(
    env: PocEnv, algorithm: Algorithm, simulated: Path, tmp_path: Path
) -> None:
    name = algorithm.recipe(name="deployed").deploy(env, warm_start=True)
    refused = prefect(env, tmp_path, "deployment", "run", name, "-p", "server_lr=2")
    assert refused.returncode != 0 and "server_lr" in refused.stdout and "maximum" in refused.stdout
    for parameters in ((), ("-p", "server_lr=1")):
        ran = prefect(env, tmp_path, "deployment", "run", name, *parameters, "--watch")
        assert ran.returncode == 0, ran.stdout
    store = env.open_store()
    second, first = [job.job_id for job in list_jobs(store) if job.job_id.startswith("deployed")]
    assert models_of(store, first) == models_of(Store(simulated.parent), simulated.name)
    final = load(store.read_bytes(JobPaths(second).global_model(2)))
    assert final["w"].tolist() == [3, 3, 3]  # from 1, by two full steps
    for job_id in (first, second):
        assert store.read_json(JobPaths(job_id).job)["code"]["modules"] == ["partial_step"]
        assert verify_job(store, job_id).status == "COMPLETED"


@pytest.mark.slow
def test_a_function_that_aggregates_travels_to_the_coordinator(
    env: PocEnv, algorithm: Algorithm, tmp_path: Path
) -> None:
    (algorithm.folder / "rules.py").write_text("def largest(values, weights):\n    return values.max(dim=0).values\n")
    importlib.invalidate_caches()
    recipe = algorithm.recipe(FedAvgRecipe, aggregator=importlib.import_module("rules").largest)
    here = recipe.execute(SimEnv(workspace=tmp_path, progress=False))
    there = recipe.execute(env)
    there.get_result(300)
    assert models_of(env.open_store(), there.job_id) == models_of(Store(tmp_path), here.job_id)


@pytest.mark.slow
def test_in_production_the_coordinator_runs_what_its_operator_allows(
    env: PocEnv, algorithm: Algorithm, simulated: Path, tmp_path: Path
) -> None:
    recipe, store = algorithm.recipe(), env.open_store()
    reached = {"api_url": env.access.api_url, "auth_string": env.access.password}
    prod = ProdEnv(**reached, store=store.url, sites=SITES, coordinator_pool="strict", progress=False)
    start = ("fedpool.cli", "coordinator", "start", "--pool", "strict")
    strict = Worker(env, tmp_path / "strict", *start).wait_until_started()
    try:
        refused = recipe.execute(prod)
        sha256 = store.read_json(JobPaths(refused.job_id).job)["code"]["sha256"]
        with pytest.raises(
            JobFailed, match=f"(?s)partial_step:PartialStepRecipe .*set FEDPOOL_ALLOWED_CODE={sha256} in"
        ):
            refused.get_result(300)
    finally:
        strict.end()
    open_minded = Worker(env, tmp_path / "open", *start, **{VARIABLE: sha256}).wait_until_started()
    try:
        recipe.execute(prod, resume=refused.job_id).get_result(300)
    finally:
        open_minded.end()
    assert models_of(store, refused.job_id) == models_of(Store(simulated.parent), simulated.name)


def test_a_class_that_cannot_travel_is_refused_by_production_too(algorithm: Algorithm) -> None:
    class InsideRecipe(FedAvgRecipe):
        pass

    prod = ProdEnv(api_url="http://127.0.0.1:9/api", store="memory://jobs", sites=SITES)
    with pytest.raises(RecipeError, match="InsideRecipe is defined inside a function"):
        algorithm.recipe(InsideRecipe).execute(prod)
