"""Cross-site and federated evaluation in real jobs: who scores what, what leaves a gap, and what
is verified and resumed.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import CrossSiteEvalRecipe, FedEvalRecipe, JobFailed, RecipeError, Result, Run, SimEnv
from fedpool.errors import IntegrityError
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.store import Store, to_json
from tests.poc import processes_of, wait_until_gone

# A site's model is its number; the closer a model is to that number, the better it scores.
SCRIPT = """
    import numpy as np
    import fedpool.client as flare

    flare.init()
    site = int(flare.get_site_name()[-1])
    while flare.is_running():
        model = flare.receive()
        score = 1 / (1 + abs(float(model.params["w"][0]) - site))
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics={"accuracy": score}, meta={"NUM_STEPS_CURRENT_ROUND": 10 * site}))
        elif flare.is_submit_model():
            flare.send(flare.FLModel(params={"w": np.full(3, site, np.float32)}))
        else:
            params = {"w": model.params["w"] + site}
            flare.send(flare.FLModel(params=params, metrics={"accuracy": score}, meta={"NUM_STEPS_CURRENT_ROUND": site}))
"""
FIELDS: dict[str, Any] = {"cross_site_eval": True, "min_clients": 3, "num_rounds": 2}
THREE = {"num_clients": 3}


def score(value: float, site: int) -> float:
    return 1 / (1 + abs(value - site))


def tasks_of(result: Result) -> list[tuple[str, str]]:
    return [(record["task"], record["model"]["owner"]) for record in result.rounds]


def accuracies(result: Result) -> dict[tuple[str, str], float | None]:
    """(data site, owner of the model) -> accuracy."""
    assert result.cross_site is not None
    return {
        (site, owner): scores["accuracy"] for site, row in result.cross_site.items() for owner, scores in row.items()
    }


@pytest.fixture
def run_recipe(prefect_api: str, tmp_path: Path, write_script: Callable[..., Path]) -> Callable[..., Run]:
    """Runs a recipe that has no training, at three sites."""

    def run(kind: type[CrossSiteEvalRecipe | FedEvalRecipe], script: str = SCRIPT, **fields: Any) -> Run:
        defaults: dict[str, Any] = {"name": "scored", "model": {"w": np.full(3, 2, np.float32)}, "min_clients": 3}
        recipe = kind(**defaults | {"train_script": write_script(script)} | fields)
        result: Run = recipe.execute(env=SimEnv(num_clients=3, workspace=tmp_path / "runs", progress=False))
        return result

    return run


def test_every_model_is_scored_at_every_site_once(run_job: Callable[..., Run], tmp_path: Path) -> None:
    run = run_job(SCRIPT, env=THREE, **FIELDS)
    result = run.get_result()
    assert tasks_of(result) == [
        ("train", "server"),
        ("train", "server"),
        ("evaluate", "server"),
        ("submit_model", "server"),
        ("evaluate", "site-1"),
        ("evaluate", "site-2"),
        ("evaluate", "site-3"),
    ]
    # The model grows by 7/3 a round: the model after the first round is the best.
    models = {"server": 14 / 3, "server-best": 7 / 3, "site-1": 1, "site-2": 2, "site-3": 3}
    assert result.best_round == 1
    assert accuracies(result) == pytest.approx(
        {(f"site-{site}", owner): score(value, site) for site in (1, 2, 3) for owner, value in models.items()}
    )
    assert result.cross_site is not None
    weights = {owner: scores["NUM_STEPS_CURRENT_ROUND"] for owner, scores in result.cross_site["site-2"].items()}
    assert weights == {"server": 20, "server-best": 2, "site-1": 20, "site-2": 20, "site-3": 20}
    assert len(result.metrics) == 3  # global models only
    store, paths = Store(tmp_path / "runs"), JobPaths(run.job_id)
    assert store.read_json(paths.cross_site) == result.cross_site
    verified = verify_job(store, run.job_id)
    assert (verified.num_rounds, verified.num_updates) == (7, 21)


def test_with_sampled_rounds_all_sites_score_and_the_best_model_is_scored_anew(run_job: Callable[..., Run]) -> None:
    result = run_job(SCRIPT, env=THREE, **FIELDS | {"clients_per_round": 2, "min_clients": 2}).get_result()
    assert [len(record["sites"]) for record in result.rounds[:4]] == [2, 2, 3, 3]
    assert result.best_round < 2
    assert tasks_of(result)[4] == ("evaluate", "server-best")
    assert result.rounds[4]["model"]["round"] == result.best_round
    assert result.rounds[4]["global"] == result.rounds[result.best_round]["global"]
    assert len(accuracies(result)) == 3 * 5


def test_a_plain_loop_takes_part_with_what_it_sends(run_job: Callable[..., Run], tmp_path: Path) -> None:
    script = """
        import fedpool.client as flare
        flare.init()
        while flare.is_running():
            model = flare.receive()
            score = float(model.params["w"][0])
            params = {"w": model.params["w"] + int(flare.get_site_name()[-1])}
            flare.send(flare.FLModel(params=params, metrics={"accuracy": score}))
    """
    run = run_job(script, env=THREE, **FIELDS | {"num_rounds": 1, "params_transfer_type": "DIFF"})
    result = run.get_result()
    # The script trains once more from the final model, which is 2, and sends full parameters, not
    # a difference.
    assert [entry["params_type"] for entry in result.rounds[2]["accepted"]] == ["FULL"] * 3
    assert {owner: value for (site, owner), value in accuracies(result).items() if site == "site-1"} == {
        "server": 2,
        "site-1": 3,
        "site-2": 4,
        "site-3": 5,
    }
    verify_job(Store(tmp_path / "runs"), run.job_id)


FAULTY = """
    import numpy as np
    import fedpool.client as flare

    flare.init()
    site = flare.get_site_name()
    while flare.is_running():
        model = flare.receive()
        value = float(model.params["w"][0])
        if flare.is_submit_model():
            if site == "site-1":
                raise RuntimeError("nothing was saved")
            if site == "site-3":
                flare.send(flare.FLModel(metrics={}))
                continue
            flare.send(flare.FLModel(params={"w": np.full(3, 5, np.float32)}))
        elif flare.is_evaluate():
            if value == 5 and site == "site-2":
                raise RuntimeError("cannot score this")
            flare.send(flare.FLModel(metrics={"accuracy": value}))
        else:
            flare.send(flare.FLModel(params=model.params))
"""


def test_who_cannot_submit_or_score_leaves_a_hole_and_the_job_goes_on(
    run_job: Callable[..., Run], tmp_path: Path
) -> None:
    run = run_job(FAULTY, env=THREE, **FIELDS | {"num_rounds": 1})
    result = run.get_result()
    assert tasks_of(result)[1:] == [("evaluate", "server"), ("submit_model", "server"), ("evaluate", "site-2")]
    assert {entry["site"] for entry in result.rounds[2]["failed"]} == {"site-1"}
    assert "nothing was saved" in result.rounds[2]["failed"][0]["cause"]
    server = {(site, "server"): 0.0 for site in ("site-1", "site-2", "site-3")}
    assert accuracies(result) == {**server, ("site-1", "site-2"): 5.0, ("site-3", "site-2"): 5.0}
    verify_job(Store(tmp_path / "runs"), run.job_id)


def test_parameters_that_stay_at_their_site_are_each_sites_own_when_it_scores(
    run_job: Callable[..., Run], tmp_path: Path
) -> None:
    script = """
        import numpy as np
        import fedpool.client as flare
        flare.init()
        site = int(flare.get_site_name()[-1])
        while flare.is_running():
            model = flare.receive()
            score = float(model.params["body"][0] * 10 + model.params["head"][0])
            params = {"body": np.full(2, site, np.float32), "head": np.full(2, site, np.float32)}
            if flare.is_evaluate():
                flare.send(flare.FLModel(metrics={"accuracy": score}))
            else:
                flare.send(flare.FLModel(params=params))
    """
    model = {"body": np.zeros(2, np.float32), "head": np.full(2, 7, np.float32)}
    fields = FIELDS | {"num_rounds": 1, "model": model, "exclude_vars": "head"}
    run = run_job(script, env=THREE, **fields)
    found = accuracies(run.get_result())
    assert {key: value for key, value in found.items() if key[1] != "server"} == {
        (f"site-{site}", f"site-{owner}"): 10 * owner + site for site in (1, 2, 3) for owner in (1, 2, 3)
    }
    verify_job(Store(tmp_path / "runs"), run.job_id)


def test_updates_that_are_not_kept_leave_the_models_that_were_scored(
    run_job: Callable[..., Run], tmp_path: Path
) -> None:
    run = run_job(SCRIPT, env=THREE, **FIELDS | {"keep_updates": "none"})
    assert len(accuracies(run.get_result())) == 15
    assert not list(Path(run.path).glob("rounds/*/sites/*/update.safetensors"))
    assert verify_job(Store(tmp_path / "runs"), run.job_id).num_pruned == 9


def test_a_site_cannot_bear_the_servers_name(run_job: Callable[..., Run]) -> None:
    with pytest.raises(RecipeError, match="calls a model of the server 'server': rename the site of that name"):
        run_job(SCRIPT, env={"clients": ["server", "site-1"]}, cross_site_eval=True)


def test_models_are_scored_across_sites_without_training(run_recipe: Callable[..., Run], tmp_path: Path) -> None:
    run = run_recipe(CrossSiteEvalRecipe)
    result = run.get_result()
    assert [task for task, _ in tasks_of(result)] == ["evaluate", "submit_model", *["evaluate"] * 3]
    assert result.num_rounds == 0 and result.best_path == result.path
    models = {"server": 2, "site-1": 1, "site-2": 2, "site-3": 3}
    assert accuracies(result) == pytest.approx(
        {(f"site-{site}", owner): score(value, site) for site in (1, 2, 3) for owner, value in models.items()}
    )
    verify_job(Store(tmp_path / "runs"), run.job_id)


def test_a_model_is_scored_everywhere_with_its_denominators(run_recipe: Callable[..., Run], tmp_path: Path) -> None:
    run = run_recipe(FedEvalRecipe)
    result = run.get_result()
    assert tasks_of(result) == [("evaluate", "server")] and result.cross_site is None
    mean = (10 * 0.5 + 20 * 1 + 30 * 0.5) / 60
    assert result.metrics == [{"accuracy": pytest.approx(mean)}]
    assert result.denominators == {"accuracy": 60}
    assert result.site_metrics == {
        f"site-{site}": {"accuracy": score(2, site), "NUM_STEPS_CURRENT_ROUND": 10 * site} for site in (1, 2, 3)
    }
    store, paths = Store(tmp_path / "runs"), JobPaths(run.job_id)
    final = store.read_json(paths.result)["final"]
    assert (final["metrics"], final["denominators"]) == (result.metrics[0], {"accuracy": 60})
    assert "num_rounds" not in store.read_json(paths.job)["recipe"]
    assert verify_job(store, run.job_id).num_rounds == 1


def test_scores_count_with_the_examples_that_they_are_of(run_job: Callable[..., Run], tmp_path: Path) -> None:
    """In the final evaluation, the cross-site evaluation and the training rounds. Updates are
    weighted as usual.
    """
    script = SCRIPT.replace('meta={"NUM_STEPS_CURRENT_ROUND": 10 * site}', 'meta={"NUM_EVAL_EXAMPLES": 10 * site}')
    script = script.replace(
        '{"NUM_STEPS_CURRENT_ROUND": site}', '{"NUM_STEPS_CURRENT_ROUND": 4 - site, "NUM_EVAL_EXAMPLES": site}'
    )
    run = run_job(script, env=THREE, **FIELDS)
    result = run.get_result()
    assert result.denominators == {"accuracy": 60}
    assert [result.rounds[0]["metrics"]["accuracy"]] == pytest.approx([sum(s * score(0, s) for s in (1, 2, 3)) / 6])
    assert [entry["weight"] for entry in result.rounds[0]["accepted"]] == [3, 2, 1]
    final = float(result.params["w"][0])
    assert final == pytest.approx(2 * 10 / 6, rel=1e-6)
    assert result.metrics[-1]["accuracy"] == pytest.approx(sum(10 * s * score(final, s) for s in (1, 2, 3)) / 60)
    assert result.cross_site is not None
    assert {row["site-1"]["NUM_STEPS_CURRENT_ROUND"] for row in result.cross_site.values()} == {10, 20, 30}
    verify_job(Store(tmp_path / "runs"), run.job_id)


DEAF = """
    import fedpool.client as flare
    flare.init()
    while flare.is_running():
        flare.receive()
        if flare.get_site_name() == "site-2":
            raise RuntimeError("no data here")
        flare.send(flare.FLModel(metrics={"accuracy": 1.0}))
"""


@pytest.mark.parametrize("kind", [FedEvalRecipe, CrossSiteEvalRecipe])
def test_without_training_too_few_answers_fail_the_job(
    kind: type[FedEvalRecipe], run_recipe: Callable[..., Run]
) -> None:
    with pytest.raises(JobFailed, match=r"(?s)2 of 3 sites.*min_clients is 3.*no data here"):
        run_recipe(kind, DEAF).get_result()
    assert run_recipe(kind, DEAF, min_clients=2).get_result().denominators == {"accuracy": 2}


@pytest.mark.parametrize("field", [{"num_rounds": 3}, {"stop_cond": "accuracy > 1"}, {"aggregation_weights": {"a": 1}}])
def test_what_only_a_training_needs_is_refused(field: dict[str, Any], write_script: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        FedEvalRecipe(name="n", model={"w": np.zeros(1)}, train_script=write_script("pass"), min_clients=1, **field)


@pytest.fixture
def scored(run_job: Callable[..., Run]) -> Path:
    """The folder of a job with three submitted models, made writable."""
    folder = Path(run_job(SCRIPT, env=THREE, **FIELDS | {"num_rounds": 1}).path)
    for path in folder.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return folder


def test_verify_finds_whatever_is_swapped(scored: Path) -> None:
    def flaw() -> str:
        with pytest.raises(IntegrityError) as caught:
            verify_job(Store(scored.parent), scored.name)
        return str(caught.value)

    def swapped(path: str, data: bytes) -> str:
        before = (scored / path).read_bytes()
        (scored / path).write_bytes(data)
        try:
            return flaw()
        finally:
            (scored / path).write_bytes(before)

    models = [scored / f"rounds/{number:05d}/global.safetensors" for number in (3, 4, 5)]
    assert "rounds/00004/global.safetensors" in swapped("rounds/00004/global.safetensors", models[0].read_bytes())
    assert "sites/site-2/update.safetensors was accepted, but should have been rejected (bytes)" in swapped(
        "rounds/00002/sites/site-2/update.safetensors", models[0].read_bytes()
    )
    matrix = json.loads((scored / "cross_site.json").read_text())
    matrix["site-1"]["site-2"]["accuracy"] = 0.99
    assert "cross_site.json does not follow from the rounds" in swapped("cross_site.json", to_json(matrix))
    # The submissions themselves expose a forger who rewrites their record.
    record = json.loads((scored / "rounds/00002/round.json").read_text())
    record["models"][0], record["models"][1] = (
        {**record["models"][0], "sha256": record["models"][1]["sha256"]},
        {**record["models"][1], "sha256": record["models"][0]["sha256"]},
    )
    assert "rounds/00002/round.json says models" in swapped("rounds/00002/round.json", to_json(record))
    record["task"] = "evaluate"
    assert "round.json says task evaluate, but it should be submit_model" in swapped(
        "rounds/00002/round.json",
        to_json({**record, "models": json.loads((scored / "rounds/00002/round.json").read_text())["models"]}),
    )
    (scored / "cross_site.json").unlink()
    assert "cross_site.json is missing" in flaw()


def test_a_round_too_many_is_found(scored: Path) -> None:
    (scored / "rounds/00006").mkdir()
    (scored / "rounds/00006/round.json").write_bytes((scored / "rounds/00005/round.json").read_bytes())
    with pytest.raises(IntegrityError, match="the job had already ended"):
        verify_job(Store(scored.parent), scored.name)


JOB = """
import sys
from pathlib import Path

import numpy as np

from fedpool import FedAvgRecipe, SimEnv

here = Path(__file__).parent
recipe = FedAvgRecipe(
    name="killed", min_clients=3, num_rounds=2, model={"w": np.zeros(3, np.float32)}, train_script=here / "client.py",
    cross_site_eval=True,
)
resume = sys.argv[1] if len(sys.argv) > 1 else None
recipe.execute(SimEnv(num_clients=3, workspace=here / "runs", progress=False), resume=resume).get_result()
"""

# Rounds 0 and 1 train, round 2 scores the final model, in round 3 the sites submit their models,
# and rounds 4 to 6 score those.
POINTS = {
    "before the submission's model is there": ("rounds/00003/global", "before"),
    "between two published models": ("rounds/00005/global", "before"),
    "before the submissions are committed": (r"rounds/00003/round\.json", "before"),
    "while a site's model is scored": (r"rounds/00005/sites/[^/]+/update\.json", "after"),
    "before the scores are written": (r"/cross_site\.json", "before"),
    "between the scores and the result": (r"/cross_site\.json", "after"),
}
SLOW = (
    "before the submission's model is there",
    "before the submissions are committed",
    "while a site's model is scored",
    "before the scores are written",
    "between the scores and the result",
)


def start(folder: Path, job_id: str | None, *kill: str) -> int:
    command = [sys.executable, *(["-m", "fedpool.testing", *kill] if kill else []), str(folder / "job.py")]
    return subprocess.run(command + ([job_id] if job_id else []), cwd=folder).returncode


def what_lasts(folder: Path) -> tuple[str, dict[str, Any]]:
    """The job's id, and everything that must be the same no matter how often it was killed."""
    store = Store(folder / "runs")
    (job_id,) = (name for name in store.names("") if name.startswith("killed-"))
    paths = JobPaths(job_id)
    models = [store.read_bytes(paths.global_model(number)) for number in range(7)]
    verify_job(store, job_id)
    return job_id, {"models": models, "cross_site": store.read_bytes(paths.cross_site)}


def prepared(folder: Path) -> Path:
    (folder / "client.py").write_text(textwrap.dedent(SCRIPT))
    (folder / "job.py").write_text(JOB)
    return folder


@pytest.fixture(scope="module")
def undisturbed(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the job produces if nothing kills it."""
    folder = prepared(tmp_path_factory.mktemp("undisturbed"))
    command = [sys.executable, str(folder / "job.py")]
    assert subprocess.run(command, cwd=folder, env=os.environ | {"PREFECT_API_URL": prefect_api}).returncode == 0
    return what_lasts(folder)[1]


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=pytest.mark.slow if point in SLOW else ()) for point in POINTS]
)
def test_killed_at_any_point_it_goes_on_to_the_same_bytes(
    point: str, undisturbed: dict[str, Any], prefect_api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    folder = prepared(tmp_path)
    pattern, when = POINTS[point]
    assert start(folder, None, "--at", pattern, "--when", when) == -signal.SIGKILL
    (job_id,) = (name for name in Store(folder / "runs").names("") if name.startswith("killed-"))
    assert start(folder, job_id) == 0
    assert what_lasts(folder)[1] == undisturbed
    wait_until_gone(processes_of, folder)
