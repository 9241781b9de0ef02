"""A job whose coordinator is killed at any instant resumes from its last commit and ends with the
same bytes as an undisturbed job.
"""

import os
import random
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import FedAvgRecipe, JobFailed, SimEnv
from fedpool.cli import main
from fedpool.errors import IntegrityError, RecipeError, StoreError
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.store import Store
from tests.poc import processes_of, wait_until_gone

ROUNDS = 4

# A site's update depends on the site, the round and the model that it received; its score depends
# on the model.
SCRIPT = """
    import numpy as np
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        rng = np.random.default_rng(len(flare.get_site_name()) * 100 + ord(flare.get_site_name()[-1]) + model.current_round)
        params = {name: value + rng.normal(size=value.shape).astype(value.dtype) for name, value in model.params.items()}
        score = float(1 / (1 + np.abs(model.params["w"] - 1).mean()))
        flare.send(flare.FLModel(params=params, metrics={"accuracy": score}))
"""

JOB = """
import sys
from pathlib import Path

import numpy as np

from fedpool import FedAvgRecipe, SimEnv

here = Path(__file__).parent
resume = sys.argv[1] if len(sys.argv) > 1 else None
recipe = FedAvgRecipe(
    name="killed", min_clients=3, model={{"w": np.zeros(50, np.float32)}}, train_script=here / "client.py", {fields}
)
print(recipe.execute(SimEnv(num_clients=3, workspace=here / "runs", progress=False), resume=resume).get_result().best_round)
"""


class Killed:
    """A job that can be killed and resumed, in its own folder."""

    def __init__(self, folder: Path, fields: str = f"num_rounds={ROUNDS}") -> None:
        (folder / "client.py").write_text(textwrap.dedent(SCRIPT))
        self.folder = folder
        self.script = folder / "job.py"
        self.script.write_text(JOB.format(fields=fields))
        self.store = Store(folder / "runs")

    @property
    def job_id(self) -> str | None:
        names = [name for name in self.store.names("") if name.startswith("killed-")]
        jobs = [name for name in names if self.store.exists(JobPaths(name).job)]  # without this file, there is no job
        assert len(jobs) <= 1
        return jobs[0] if jobs else None

    def start(self, *kill: str) -> subprocess.Popen[bytes]:
        """Start the job, or resume it if it has begun."""
        command = [sys.executable, *(["-m", "fedpool.testing", *kill] if kill else []), str(self.script)]
        return subprocess.Popen(command + ([self.job_id] if self.job_id else []), cwd=self.folder)

    def bytes(self) -> dict[str, Any]:
        """Everything that must be the same, however often the job was killed."""
        assert self.job_id is not None
        paths = JobPaths(self.job_id)
        result = self.store.read_json(paths.result)
        models = [self.store.read_bytes(paths.global_model(number)) for number in range(result["num_rounds"] + 1)]
        best = {which: (result[which]["round"], result[which]["metrics"]) for which in ("final", "best")}
        return {"models": models, "status": result["status"], "num_records": result["num_records"], **best}


@pytest.fixture(scope="module")
def undisturbed(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of the job when nobody kills it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Killed(folder)
    assert (
        subprocess.run([sys.executable, job.script], env=os.environ | {"PREFECT_API_URL": prefect_api}).returncode == 0
    )
    return job.bytes()


@pytest.fixture
def killed(tmp_path: Path) -> Killed:
    return Killed(tmp_path)


@pytest.fixture(autouse=True)
def _same_server(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)


POINTS = {
    "before the first model is published": ("rounds/00000/global", "before"),
    "before the job is described": ("/job\\.json", "before"),
    "after the job is described": ("/job\\.json", "after"),
    "between two manifests": ("rounds/00001/sites/[^/]+/update\\.json", "after"),
    "before a model is published": ("rounds/00002/global", "before"),
    "after the commit": ("rounds/00001/round\\.json", "after"),
    "before the evaluation is committed": (f"rounds/{ROUNDS:05d}/round\\.json", "before"),
    # these are the easiest to get wrong, and run in CI
    "between an update and its manifest": ("rounds/00001/sites/[^/]+/update\\.json", "before"),
    "after aggregation and before the commit": ("rounds/00001/round\\.json", "before"),
    "before the result": ("/result\\.json", "before"),
}


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=pytest.mark.slow if at < 7 else ()) for at, point in enumerate(POINTS)]
)
def test_killed_at_any_point_of_a_round_it_goes_on_to_the_same_bytes(
    point: str, killed: Killed, undisturbed: dict[str, Any]
) -> None:
    pattern, when = POINTS[point]
    assert killed.start("--at", pattern, "--when", when).wait() == -signal.SIGKILL
    assert killed.start().wait() == 0
    assert killed.bytes() == undisturbed
    wait_until_gone(processes_of, killed.folder)
    assert killed.job_id is not None
    assert verify_job(killed.store, killed.job_id).num_rounds == ROUNDS + 1


@pytest.mark.slow
def test_what_early_stopping_has_counted_survives(tmp_path: Path) -> None:
    """The model of round 1 is the best, so a job killed in round 2 has seen one of two rounds
    without progress.
    """
    jobs = []
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        jobs.append(Killed(tmp_path / name, "num_rounds=9, patience=2"))
    undisturbed, killed = jobs
    assert killed.start("--at", "rounds/00002/round\\.json", "--when", "after").wait() == -signal.SIGKILL
    assert killed.start().wait() == 0
    assert undisturbed.start().wait() == 0
    assert killed.bytes() == undisturbed.bytes()
    assert killed.bytes()["best"][0] == 1 and len(killed.bytes()["models"]) == 5  # four rounds of nine


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_at_random_instants_it_ends_with_the_same_bytes(
    times: int, killed: Killed, undisturbed: dict[str, Any]
) -> None:
    rng = random.Random(times)
    for _ in range(times):
        coordinator = killed.start()
        with suppress(subprocess.TimeoutExpired):  # the instant is random
            coordinator.wait(rng.uniform(2.0, 7.0))
        coordinator.kill()
        coordinator.wait()
    assert killed.start().wait() == 0
    assert killed.bytes() == undisturbed
    wait_until_gone(processes_of, killed.folder)
    assert killed.job_id is not None
    verify_job(killed.store, killed.job_id)


BROKEN = """
    import sys
    from pathlib import Path
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        if model.current_round == 1 and not (Path(sys.argv[1]) / "mended").exists():
            raise SystemExit("broken")
        flare.send(model)
"""


def recipe_in(folder: Path, script: str = SCRIPT, **fields: Any) -> FedAvgRecipe:
    (folder / "client.py").write_text(textwrap.dedent(script))
    given = {"name": "again", "min_clients": 2, "num_rounds": 3, "model": {"w": np.zeros(5, np.float32)}}
    return FedAvgRecipe(**given | {"train_script": folder / "client.py"} | fields)


@pytest.fixture
def env(prefect_api: str, tmp_path: Path) -> SimEnv:
    return SimEnv(num_clients=2, workspace=tmp_path / "runs", progress=False)


def test_a_job_that_has_completed_is_left_as_it_is(env: SimEnv, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    first = recipe.execute(env)
    before = {path: path.stat().st_mtime_ns for path in Path(first.path).rglob("*")}
    again = recipe.execute(env, resume=first.job_id)
    assert again.get_result().path == first.get_result().path
    assert {path: path.stat().st_mtime_ns for path in Path(first.path).rglob("*")} == before


def test_a_job_that_has_failed_goes_on_when_its_cause_is_gone(env: SimEnv, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, script=BROKEN, train_args=[str(tmp_path)])
    failed = recipe.execute(env)
    with pytest.raises(JobFailed, match=r"(?s)round 1: 0 of 2 sites.*broken"):
        failed.get_result()
    (tmp_path / "mended").touch()
    result = recipe.execute(env, resume=failed.job_id).get_result()
    assert result.num_rounds == 3
    assert verify_job(Store(tmp_path / "runs"), failed.job_id).status == "COMPLETED"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_rounds": 4}, "num_rounds: 3 in the job, 4 here"),
        ({"seed": 1, "min_clients": 1}, "(?s)min_clients: 2 in the job, 1 here.*seed: 0 in the job, 1 here"),
        (
            {"model": {"w": np.zeros(6, np.float32)}},
            r"model: \{'w': 'F32 \[5\]'\} in the job, \{'w': 'F32 \[6\]'\} here",
        ),
    ],
)
def test_a_job_does_not_go_on_with_another_recipe(
    changes: dict[str, Any], words: str, env: SimEnv, tmp_path: Path
) -> None:
    first = recipe_in(tmp_path).execute(env)
    with pytest.raises(RecipeError, match=words) as caught:
        recipe_in(tmp_path, **changes).execute(env, resume=first.job_id)
    assert "fork it (fork=True) to change" in str(caught.value)


def test_a_job_does_not_go_on_at_other_sites_or_with_another_script(env: SimEnv, tmp_path: Path) -> None:
    first = recipe_in(tmp_path).execute(env)
    elsewhere = env.model_copy(update={"num_clients": 3})
    with pytest.raises(
        RecipeError, match=r"sites: .'site-1', 'site-2'. in the job, .'site-1', 'site-2', 'site-3'. here"
    ):
        recipe_in(tmp_path).execute(elsewhere, resume=first.job_id)
    with pytest.raises(RecipeError, match="script: "):
        recipe_in(tmp_path, BROKEN).execute(env, resume=first.job_id)


def test_a_job_that_is_not_there_cannot_go_on(env: SimEnv, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no job 'again-1' in file://"):
        recipe_in(tmp_path).execute(env, resume="again-1")


def test_a_job_under_way_is_not_run_twice(env: SimEnv, tmp_path: Path) -> None:
    run = recipe_in(tmp_path).execute(env)
    store = Store(tmp_path / "runs")
    store.remove(JobPaths(run.job_id).result)
    with store.held(run.job_id), pytest.raises(StoreError, match="another process is running this job"):
        recipe_in(tmp_path).execute(env, resume=run.job_id)


def test_what_was_tampered_with_is_not_gone_on_with(env: SimEnv, tmp_path: Path) -> None:
    run = recipe_in(tmp_path).execute(env)
    store, paths = Store(tmp_path / "runs"), JobPaths(run.job_id)
    store.remove(paths.result)
    record = Path(store.full(paths.record(1)))
    record.write_text(record.read_text().replace('"weight": 1.0', '"weight": 2.0'))
    with pytest.raises(IntegrityError, match=r"00002/round.json does not follow from the round before it"):
        recipe_in(tmp_path).execute(env, resume=run.job_id)


@pytest.mark.parametrize(("from_round", "start"), [(None, 3), (0, 0), (2, 2)])
def test_a_fork_is_a_new_job_from_a_model_of_another(
    from_round: int | None, start: int, env: SimEnv, tmp_path: Path
) -> None:
    first = recipe_in(tmp_path).execute(env)
    second = recipe_in(tmp_path, num_rounds=1, seed=7).execute(
        env, resume=first.job_id, fork=True, from_round=from_round
    )
    assert second.job_id != first.job_id
    store = Store(tmp_path / "runs")
    assert store.read_json(JobPaths(second.job_id).job)["parent"] == {"job_id": first.job_id, "round": start}
    begins = store.read_bytes(JobPaths(second.job_id).global_model(0))
    assert begins == store.read_bytes(JobPaths(first.job_id).global_model(start))
    assert verify_job(store, second.job_id).status == "COMPLETED"


def test_a_fork_needs_a_model_that_was_committed_and_fits(env: SimEnv, tmp_path: Path) -> None:
    first = recipe_in(tmp_path).execute(env)
    with pytest.raises(RecipeError, match=r"00009/global.safetensors is not a model that job again-\S+ committed"):
        recipe_in(tmp_path).execute(env, resume=first.job_id, fork=True, from_round=9)
    other = recipe_in(tmp_path, model={"v": np.zeros(5, np.float32)})
    with pytest.raises(RecipeError, match="a model with other parameters than the recipe's"):
        other.execute(env, resume=first.job_id, fork=True)


def test_the_command_goes_on_with_a_job(env: SimEnv, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe_in(tmp_path).execute(env)
    store, paths = Store(tmp_path / "runs"), JobPaths(run.job_id)
    models = [store.read_bytes(paths.global_model(number)) for number in range(4)]
    for path in (paths.result, paths.record(2), paths.manifest(2, "site-2")):
        store.remove(path)
    store.fs.rm(store.full(paths.round(3)), recursive=True)
    with pytest.raises(SystemExit, match="0"):
        main(["job", "resume", run.job_id, "--store", store.url])
    assert f"{run.job_id}: COMPLETED" in capsys.readouterr().out
    assert [store.read_bytes(paths.global_model(number)) for number in range(4)] == models
    record = store.read_json(paths.record(2))
    assert [(entry["site"], entry["attempt"]) for entry in record["accepted"]] == [("site-1", 0), ("site-2", 1)]
    with pytest.raises(SystemExit, match="0"):
        main(["job", "resume", run.job_id, "--store", store.url, "--fork", "--from-round", "1"])
    assert "COMPLETED" in capsys.readouterr().out
