"""Trackers hold every site's scalars with step and time, and the server's metrics; the tests read
them with the trackers' own tools.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fedpool import FedAvgRecipe, PocEnv, Run, SimEnv
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.store import Store
from tests.deployments.test_resumed import forget
from tests.poc import brought_up
from tests.trackers import MLflowStore, Series, read_tensorboard, read_texts

# Written like NVFlare's examples of experiment tracking, apart from the imports.
SCRIPT = """
import numpy as np
import fedpool.client as flare
from fedpool.client.tracking import MLflowWriter, SummaryWriter

def main():
    flare.init()
    summary_writer = SummaryWriter()
    mlflow_writer = MLflowWriter()
    mlflow_writer.log_params({"batch_size": 4})
    mlflow_writer.set_tags({"team": "vision"})
    client_id = flare.get_site_name()
    scale = float(client_id[-1])
    while flare.is_running():
        input_model = flare.receive()
        if flare.is_train():
            for i in range(5):
                global_step = input_model.current_round * 5 + i
                summary_writer.add_scalar(tag="train/loss", scalar=scale / (global_step + 1), global_step=global_step)
            summary_writer.add_scalars("parts", {"a": 1.0 * scale, "b": np.float32(2.0)}, input_model.current_round)
            summary_writer.add_text("note", "half way", global_step)
            mlflow_writer.log_metric(key="local_accuracy", value=0.25 * scale, step=global_step)
            mlflow_writer.log_text("a text", "notes/a.txt")
            summary_writer.flush()
            params = {name: value + 1 for name, value in input_model.params.items()}
            output_model = flare.FLModel(params=params, metrics={"accuracy": 0.1 * input_model.current_round})
            flare.send(output_model)
        elif flare.is_evaluate():
            flare.send(flare.FLModel(metrics={"accuracy": 0.75}))
    summary_writer.close()

if __name__ == "__main__":
    main()
"""


def expected_of(site: int, rounds: int) -> dict[str, list[tuple[int, float]]]:
    """The scalars that a site has logged."""
    return {
        "train/loss": [(step, site / (step + 1)) for step in range(5 * rounds)],
        "parts/a": [(number, 1.0 * site) for number in range(rounds)],
        "parts/b": [(number, 2.0) for number in range(rounds)],
        "local_accuracy": [(5 * number + 4, 0.25 * site) for number in range(rounds)],
    }


def check(found: Series, expected: Mapping[str, list[tuple[int, float]]], since: float) -> None:
    """Compare a run; check that every scalar has the time at which it was logged."""
    for name, rows in expected.items():
        assert [step for step, _, _ in found[name]] == [step for step, _ in rows], name
        assert [value for _, value, _ in found[name]] == pytest.approx([value for _, value in rows], abs=1e-6), name
        times = [when for _, _, when in found[name]]
        assert times == sorted(times) and since - 1 < times[0] and times[-1] < time.time() + 1, name


def check_job(tensorboard: Path, mlflow: MLflowStore, job_id: str, name: str, since: float, rounds: int = 2) -> Any:
    """Compare all runs of a job that runs `SCRIPT`; returns the server's run in MLflow."""
    assert sorted(os.listdir(tensorboard)) == ["server", "site-1", "site-2"]
    runs = mlflow.runs(name)
    assert sorted(runs) == ["server", "site-1", "site-2"]
    for number in (1, 2):
        site = f"site-{number}"
        scores = [(r, 0.1 * r) for r in range(rounds)] + [(rounds, 0.75)]
        expected = expected_of(number, rounds) | {"global_model/accuracy": scores}
        check(read_tensorboard(tensorboard / site), expected, since)
        check(mlflow.read(runs[site]), expected, since)
        assert runs[site].data.tags["mlflow.parentRunId"] == runs["server"].info.run_id
    means = {
        "accuracy": [(r, 0.1 * r) for r in range(rounds)] + [(rounds, 0.75)],
        "key_metric": [(r, 0.1 * r) for r in range(rounds)] + [(rounds, 0.75)],
        "train/loss": [(r, 1.5 / (5 * r + 5)) for r in range(rounds)],
        "local_accuracy": [(r, 0.375) for r in range(rounds)],
    }
    check(read_tensorboard(tensorboard / "server"), means, since)
    check(mlflow.read(runs["server"]), means, since)
    texts = read_texts(tensorboard / "server")
    assert job_id in next(text for tag, text in texts.items() if tag.startswith("recipe"))
    assert "COMPLETED" in next(text for tag, text in texts.items() if tag.startswith("result"))
    server = runs["server"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert server.data.tags["fedpool.status"] == "COMPLETED" and server.data.params["num_rounds"] == str(rounds)
    return server


def recipe_of(folder: Path, **fields: Any) -> FedAvgRecipe:
    """A recipe that runs `SCRIPT`."""
    (folder / "client.py").write_text(SCRIPT)
    defaults: dict[str, Any] = {"name": "tracked", "min_clients": 2, "num_rounds": 2}
    model = {"w": np.zeros(3, np.float32)}
    return FedAvgRecipe(**defaults | {"model": model, "train_script": folder / "client.py"} | fields)


def test_in_a_simulation_they_hold_it_all_and_a_job_that_is_resumed_goes_on_in_the_same_runs(
    leaves_nothing: None, tmp_path: Path
) -> None:
    since, uri = time.time(), f"sqlite:///{tmp_path}/mlflow.db"
    env = SimEnv(num_clients=2, workspace=tmp_path / "runs", progress=False, track=["tensorboard", f"mlflow:{uri}"])
    recipe = recipe_of(tmp_path)
    run: Run = recipe.execute(env=env)
    result = run.get_result()
    store, mlflow, paths = Store(tmp_path / "runs"), MLflowStore(uri), JobPaths(run.job_id)
    tensorboard = tmp_path / "runs" / run.job_id / "tensorboard"
    before = check_job(tensorboard, mlflow, run.job_id, "tracked", since)
    assert result.rounds[1]["logged"]["train/loss"] == pytest.approx(
        1.5 / 10
    )  # the record has the last values, as always
    assert not store.exists(paths.scalars(0, "site-1")) and not store.exists(paths.tracked)
    verify_job(store, run.job_id)
    forget(store, run.job_id, 1)
    assert recipe.execute(env=env, resume=run.job_id).get_result() is not None
    again = mlflow.runs("tracked")
    assert again["server"].info.run_id == before.info.run_id and again["server"].info.status == "FINISHED"
    steps = [step for step, _, _ in mlflow.read(again["site-1"])["train/loss"]]
    assert sorted(set(steps)) == list(range(10)) and len(steps) == 15  # the lost round was run again
    assert len(list((tensorboard / "site-1").iterdir())) == 2
    verify_job(store, run.job_id)


@pytest.mark.slow
def test_so_they_do_in_a_proof_of_concept_whose_sites_are_processes_of_their_own(tmp_path: Path) -> None:
    since, uri = time.time(), f"sqlite:///{tmp_path}/mlflow.db"
    env = PocEnv(
        num_clients=2, home=tmp_path / "poc", progress=False, track=[f"tensorboard:{tmp_path}/logs", f"mlflow:{uri}"]
    )
    recipe = recipe_of(tmp_path, keep_updates="none")
    with brought_up(env):
        run: Run = recipe.execute(env=env)
        run.get_result()
        store, paths = env.open_store(), JobPaths(run.job_id)
        check_job(tmp_path / "logs" / run.job_id, MLflowStore(uri), run.job_id, "tracked", since)
        for site in ("site-1", "site-2"):
            assert store.exists(paths.scalars(1, site)) and not store.exists(paths.update(1, site))
            manifest = store.read_json(paths.manifest(1, site))
            assert manifest["scalars"]["size"] == store.size(paths.scalars(1, site))
        verify_job(store, run.job_id)
        plain: Run = recipe.execute(env=env.model_copy(update={"track": ()}))
        plain.get_result()
        paths = JobPaths(plain.job_id)
        assert not store.exists(paths.tracked) and "scalars" not in store.read_json(paths.manifest(1, "site-1"))
        verify_job(store, plain.job_id)


def test_a_tracker_that_fails_is_a_warning_and_fails_no_job(
    run_job: Callable[..., Run], leaves_nothing: None, tmp_path: Path
) -> None:
    (tmp_path / "file").mkdir()
    track = [f"tensorboard:{tmp_path}/file/below", "mlflow:http://127.0.0.1:9"]
    env = SimEnv(num_clients=2, workspace=tmp_path / "runs", progress=False, track=track)
    (tmp_path / "file").rmdir()
    (tmp_path / "file").touch()  # it was a folder when the environment was built
    recipe = recipe_of(tmp_path)
    run: Run = recipe.execute(env=env)
    assert run.get_result().params["w"].tolist() == [2, 2, 2]
    verify_job(Store(tmp_path / "runs"), run.job_id)
    assert not [p for p in psutil.Process().children() if "fedpool.tasks.tracker_process" in p.cmdline()]
