"""Jobs written by earlier versions keep their original meaning, to the byte."""

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpool import SimEnv, TrainingRecipe
from fedpool.errors import IntegrityError
from fedpool.flows.averaging import AveragingRecipe
from fedpool.flows.replay import replay_round
from fedpool.flows.staging import check_unchanged
from fedpool.flows.stored import recipe_of
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.choose_aggregator import written
from tests.own_algorithm import job_code_forgotten

FOLDER = Path(__file__).parent
ARCHIVES = {
    "48fad92": "every aggregator and every algorithm whose arithmetic is its own, at up to eleven sites",
    "d3a726f": "every aggregator, its parameters beside it in the recipe",
}
"""Commit that wrote the jobs -> what they cover."""


def of_commit(commit: str) -> tarfile.TarFile:
    return tarfile.open(FOLDER / f"jobs-of-{commit}.tar.xz")


def job_ids(commit: str) -> list[str]:
    with of_commit(commit) as archive:
        return sorted({name.partition("/")[0] for name in archive.getnames()})


JOBS = [job_id for commit in ARCHIVES for job_id in job_ids(commit)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with all the jobs."""
    folder = tmp_path_factory.mktemp("old-jobs")
    for commit in ARCHIVES:
        with of_commit(commit) as opened:
            opened.extractall(folder, filter="data")
    yield Store(folder)


@pytest.mark.parametrize("job_id", JOBS)
def test_it_is_verified(store: Store, job_id: str) -> None:
    verified = verify_job(store, job_id)
    assert verified.status == "COMPLETED" and verified.num_rounds >= 3


@pytest.mark.parametrize("job_id", JOBS)
def test_it_can_be_resumed_as_it_was(store: Store, job_id: str) -> None:
    sites = store.read_json(JobPaths(job_id).job)["sites"]
    check_unchanged(recipe_of(job_id, store), job_id, store, sites)


@pytest.mark.parametrize(
    ("name", "aggregator"),
    [
        ("median", "median"),
        ("trimmed-mean", {"kind": "trimmed_mean", "trim_ratio": 0.2}),
        ("krum", {"kind": "krum", "num_byzantine": 1}),
        ("multi-krum", {"kind": "multi_krum", "num_byzantine": 1, "num_selected": 3}),
        ("bulyan", {"kind": "bulyan", "num_byzantine": 1, "even_median": "element"}),
        ("bulyan-midpoint", {"kind": "bulyan", "num_byzantine": 1, "even_median": "midpoint"}),
        ("geometric-median", {"kind": "geometric_median", "weighted": True}),
        ("geometric-median-alike", {"kind": "geometric_median", "weighted": False}),
        ("norm-clipped-mean", {"kind": "norm_clipped_mean", "clip_norm": 1.5}),
    ],
)
def test_the_parameters_that_lay_beside_the_aggregator_are_its_own_and_a_replay_comes_to_the_same_bytes(
    store: Store, tmp_path: Path, name: str, aggregator: object
) -> None:
    (job_id,) = (job_id for job_id in job_ids("d3a726f") if job_id.rpartition("-20")[0] == name)
    recipe = recipe_of(job_id, store)
    assert isinstance(recipe, AveragingRecipe) and written(recipe.rule) == aggregator
    assert recipe.given is not None and recipe.given <= type(recipe).model_fields.keys()
    replayed = replay_round(store, job_id, tmp_path / "model.safetensors", round=0)
    assert replayed.distance == 0 and replayed.moved > 0
    assert replayed.sha256 == store.read_json(JobPaths(job_id).record(0))["next_global"]["sha256"]


def test_a_job_that_was_lost_goes_on_to_the_same_bytes(store: Store, tmp_path: Path, prefect_api: str) -> None:
    job_id = next(job_id for job_id in job_ids("d3a726f") if job_id.startswith("krum"))
    paths, lost = JobPaths(job_id), Store(tmp_path)
    shutil.copytree(Path(store.full(job_id)), tmp_path / job_id)
    final = paths.global_model(2)
    wanted = lost.read_bytes(final)
    lost.remove(paths.result)
    shutil.rmtree((tmp_path / final).parent)  # only the first round is committed
    shutil.rmtree((tmp_path / paths.record(1)).with_name("sites"))
    for path in (paths.record(1), paths.state(1)):
        lost.remove(path)
    env = SimEnv(num_clients=7, workspace=tmp_path, progress=False)
    assert recipe_of(job_id, lost).execute(env, resume=job_id).get_status() == "COMPLETED"
    assert lost.read_bytes(final) == wanted
    assert verify_job(lost, job_id).num_rounds == 3


@pytest.mark.parametrize(
    ("name", "num_rounds", "trains"), [("own-class", 3, True), ("fedeval", 1, False), ("cross-site", 5, False)]
)
def test_a_job_of_when_every_recipe_had_the_fields_of_a_training_is_what_it_was(
    tmp_path: Path, name: str, num_rounds: int, trains: bool
) -> None:
    """One job has a custom class that derives from `Recipe` and trains."""
    with tarfile.open(FOLDER / "recipes-of-d3a726f.tar.xz") as opened:
        opened.extractall(tmp_path, filter="data")
    store = Store(tmp_path)
    (job_id,) = (folder.name for folder in tmp_path.glob(f"{name}-*"))
    with job_code_forgotten():
        recipe = recipe_of(job_id, store, allow=lambda request: None)
        assert isinstance(recipe, TrainingRecipe) == trains
        verified = verify_job(store, job_id, allow=lambda request: None)
        assert (verified.status, verified.num_rounds) == ("COMPLETED", num_rounds)
        check_unchanged(recipe, job_id, store, store.read_json(JobPaths(job_id).job)["sites"])
        assert recipe.revise(min_clients=1).min_clients == 1


def test_a_record_that_was_changed_is_still_found_out(store: Store, tmp_path: Path) -> None:
    job_id = next(name for name in job_ids("48fad92") if name.startswith("krum"))
    with of_commit("48fad92") as opened:
        opened.extractall(tmp_path, [m for m in opened if m.name.startswith(job_id)], filter="data")
    path = tmp_path / JobPaths(job_id).record(0)
    record = json.loads(path.read_text())
    record["accepted"][0]["weight"] += 1
    path.chmod(0o644)
    path.write_text(json.dumps(record, indent=2, sort_keys=True))
    with pytest.raises(IntegrityError, match=r"round\.json"):
        verify_job(Store(tmp_path), job_id)
