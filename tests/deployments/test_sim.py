"""Whole jobs in simulation: what a user can rely on."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedpool import FedAvgRecipe, JobCancelled, JobStatus, RecipeError, Run, SimEnv
from fedpool.sites.devices import num_devices

pytestmark = pytest.mark.usefixtures("leaves_nothing")

# Sends the value and the weight from its per_site_config.
SENDS_VALUE = """
    import numpy as np
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        flare.receive()
        config = flare.get_config()
        params = {"w": np.array(config["value"], np.float32)}
        flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": config["weight"]}))
"""

TRAINS = """
    import torch
    import fedpool.client as flare

    model = torch.nn.Linear(8, 3)
    flare.init()
    while flare.is_running():
        model.load_state_dict(flare.receive().params)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            loss = model(torch.randn(16, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        flare.send(flare.FLModel(params=model.state_dict(), metrics={"loss": loss}, meta={"NUM_STEPS_CURRENT_ROUND": 5}))
"""

# The model's only parameter counts the rounds; each test fills in how it is scored.
COUNTS = """
    import numpy as np
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        score = {score}
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics={{"accuracy": score}}))
        else:
            flare.send(flare.FLModel(params={{"w": model.params["w"] + 1}}, metrics={{"accuracy": score}}))
"""


def global_models(run: Run) -> list[bytes]:
    """The bytes of every global model of a job, in order."""
    return [path.read_bytes() for path in sorted(Path(run.path).glob("rounds/*/global.safetensors"))]


def test_hello_numpy_gives_its_exact_matrix(run_job: Callable[..., Run]) -> None:
    matrix = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.float32)
    result = run_job(model={"w": matrix}, num_rounds=3).get_result()
    assert result.params["w"].tolist() == [[4, 5, 6], [7, 8, 9], [10, 11, 12]]


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ([[2, 4, 6], [3, 6, 9]], [1, 2], [8 / 3, 16 / 3, 8]),
        ([[i] for i in range(10)], [1] * 10, [4.5]),
        ([[2], [6]], [1, 3], [5.0]),
        ([[2, 4], [4, 8]], [1, 100], [402 / 101, 804 / 101]),
        ([[2], [6]], [0, 3], [6.0]),
    ],
)
def test_weighted_means_are_exact(
    values: list[list[float]], weights: list[float], expected: list[float], run_job: Callable[..., Run]
) -> None:
    sites = {f"site-{i + 1}": {"value": v, "weight": w} for i, (v, w) in enumerate(zip(values, weights, strict=True))}
    run = run_job(
        SENDS_VALUE,
        env={"num_clients": len(values)},
        num_rounds=1,
        model={"w": np.zeros(len(expected), np.float32)},
        per_site_config=sites,
    )
    np.testing.assert_array_equal(run.get_result().params["w"], np.array(expected, np.float32))


def test_the_same_seed_gives_the_same_bits_whatever_runs_at_once(run_job: Callable[..., Run]) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3)
    common: dict[str, Any] = {"model": model, "num_rounds": 2, "min_clients": 4}
    variants = [{"num_threads": 4}, {"num_threads": 1}, {"num_threads": 2, "keep_alive": False}]
    runs = [run_job(TRAINS, env={"num_clients": 4} | variant, **common) for variant in variants]
    first, *others = [global_models(run) for run in runs]
    assert len(first) == 3 and len(set(first)) == 3
    assert all(models == first for models in others)
    different_seed = global_models(run_job(TRAINS, env={"num_clients": 4}, **common, seed=1))
    assert different_seed[0] == first[0] and different_seed[1] != first[1]


def test_differences_give_the_same_model_as_full_parameters(run_job: Callable[..., Run]) -> None:
    full, diff = (run_job(model={"w": np.arange(3.0)}, params_transfer_type=kind) for kind in ("FULL", "DIFF"))
    assert diff.get_result().rounds[0]["accepted"][0]["params_type"] == "DIFF"
    assert global_models(full) == global_models(diff)


def test_the_best_model_is_the_one_with_the_best_score_of_its_own(run_job: Callable[..., Run]) -> None:
    # The models score 0, 0.1, 0.4 and 0.3: the third is best, though it arrived with the score of
    # the second.
    script = COUNTS.format(score="[0, 0.1, 0.4, 0.3][int(model.params['w'][0])]")
    result = run_job(script, num_rounds=3).get_result()
    assert [metrics["accuracy"] for metrics in result.metrics] == [0, 0.1, 0.4, 0.3]
    assert result.best_round == 2 and float(result.best_params["w"][0]) == 2
    assert result.num_rounds == 3 and float(result.params["w"][0]) == 3
    assert result.rounds[-1]["task"] == "evaluate"


def test_the_last_model_can_be_the_best_also_in_a_job_of_one_round(run_job: Callable[..., Run]) -> None:
    result = run_job(COUNTS.format(score="float(model.params['w'][0])"), num_rounds=1).get_result()
    assert result.best_round == 1 and result.best_path == result.path


def test_less_can_be_better(run_job: Callable[..., Run]) -> None:
    script = COUNTS.format(score="float(model.params['w'][0])")
    assert run_job(script, key_metric_mode="min").get_result().best_round == 0


def test_a_job_stops_early_when_the_condition_holds(run_job: Callable[..., Run]) -> None:
    script = COUNTS.format(score="float(model.params['w'][0]) / 10")
    result = run_job(script, num_rounds=9, stop_cond="accuracy>=0.2").get_result()
    assert result.num_rounds == 3 and result.stopped_by is not None and "accuracy >= 0.2" in result.stopped_by


def test_a_job_stops_early_without_progress(run_job: Callable[..., Run]) -> None:
    result = run_job(COUNTS.format(score="0.5"), num_rounds=9, patience=2).get_result()
    assert result.num_rounds == 3 and result.stopped_by == "accuracy did not improve in 2 rounds"


def test_without_metrics_nothing_is_scored_and_the_last_model_counts_as_best(run_job: Callable[..., Run]) -> None:
    result = run_job().get_result()
    assert [record["task"] for record in result.rounds] == ["train", "train"]
    assert result.best_round == 2 and result.best_path == result.path


def test_clients_per_round_draws_sites_by_seed(run_job: Callable[..., Run]) -> None:
    common: dict[str, Any] = {"env": {"num_clients": 6}, "clients_per_round": 2, "num_rounds": 4}
    drawn = [[r["sites"] for r in run_job(**common, seed=seed).get_result().rounds] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(sites) == 2 for sites in drawn[0]) and len({tuple(sites) for sites in drawn[0]}) > 1


def test_state_of_a_script_lives_over_rounds_with_keep_alive_and_not_without(run_job: Callable[..., Run]) -> None:
    script = """
        import numpy as np
        import fedpool.client as flare
        flare.init()
        rounds = 0
        while flare.is_running():
            flare.receive()
            rounds += 1
            flare.send(flare.FLModel(params={"w": np.full(3, rounds, np.float32)}))
    """
    kept, fresh = (
        run_job(script, num_rounds=3, env={"keep_alive": keep, "num_threads": 1}).get_result() for keep in (True, False)
    )
    assert float(kept.params["w"][0]) == 3 and float(fresh.params["w"][0]) == 1


def test_a_script_without_a_loop_gets_a_fresh_start_each_round(run_job: Callable[..., Run]) -> None:
    script = """
        import fedpool.client as flare
        flare.init()
        model = flare.receive()
        flare.send(flare.FLModel(params={"w": model.params["w"] + 1}))
    """
    assert float(run_job(script, num_rounds=3).get_result().params["w"][0]) == 3


@pytest.mark.parametrize("keep_alive", [True, False])
def test_excluded_variables_stay_at_their_site(keep_alive: bool, run_job: Callable[..., Run]) -> None:
    script = """
        import numpy as np
        import fedpool.client as flare
        flare.init()
        while flare.is_running():
            model = flare.receive()
            own = 10 if flare.get_site_name() == "site-1" else 20
            if model.current_round > 0:
                assert model.params["head.w"].tolist() == [own] * 2, model.params["head.w"]
            flare.send(flare.FLModel(params={"body.w": model.params["body.w"] + 1, "head.w": np.full(2, own, np.float32)}))
    """
    model = {"body.w": np.zeros(2, np.float32), "head.w": np.zeros(2, np.float32)}
    run = run_job(script, model=model, exclude_vars=["^head"], num_rounds=3, env={"keep_alive": keep_alive})
    params = run.get_result().params
    assert params["body.w"].tolist() == [3, 3] and params["head.w"].tolist() == [0, 0]


def test_sites_get_their_own_config_and_arguments_and_their_log_is_in_the_record(run_job: Callable[..., Run]) -> None:
    script = """
        import sys
        import fedpool.client as flare
        flare.init()
        while flare.is_running():
            model = flare.receive()
            assert flare.get_config() == ({"k": [1]} if flare.get_site_name() == "b" else {}), flare.get_config()
            assert sys.argv[1:] == (["--lr", "2"] if flare.get_site_name() == "b" else ["--lr", "a b"]), sys.argv
            flare.log("loss", float(sys.argv[2] == "2"), global_step=1)
            flare.send(flare.FLModel(params=model.params))
    """
    config = {"b": {"k": [1], "train_args": "--lr 2"}}
    run = run_job(script, env={"clients": ["a", "b"]}, train_args='--lr "a b"', per_site_config=config)
    assert run.get_result().rounds[0]["logged"] == {"loss": 0.5}


def test_aggregation_weights_multiply(run_job: Callable[..., Run]) -> None:
    sites = {"site-1": {"value": [2], "weight": 1}, "site-2": {"value": [6], "weight": 1}}
    run = run_job(
        SENDS_VALUE,
        num_rounds=1,
        model={"w": np.zeros(1, np.float32)},
        per_site_config=sites,
        aggregation_weights={"site-2": 3},
    )
    assert float(run.get_result().params["w"][0]) == 5


def test_devices_are_dealt_to_slots(prefect_api: str, write_script: Callable[..., Path], tmp_path: Path) -> None:
    script = """
        import os
        import numpy as np
        import fedpool.client as flare
        flare.init()
        while flare.is_running():
            flare.receive()
            flare.send(flare.FLModel(params={"w": np.full(3, int(os.environ["CUDA_VISIBLE_DEVICES"]), np.float32)}))
    """
    env = SimEnv(num_clients=2, num_threads=2, workspace=tmp_path / "runs", progress=False)
    # A copy is not validated: the script only reads the numbers, so this machine need not have such
    # devices.
    env = env.model_copy(update={"gpus": "4, 6"})
    recipe = FedAvgRecipe(
        name="devices",
        min_clients=2,
        num_rounds=1,
        model={"w": np.zeros(3, np.float32)},
        train_script=write_script(script),
    )
    result = recipe.execute(env).get_result()
    assert float(result.params["w"][0]) == 5  # the mean of the two devices


@pytest.mark.skipif(num_devices() > 0, reason="needs a machine without a CUDA device")
def test_devices_that_a_machine_lacks_are_refused_when_the_environment_is_built() -> None:
    with pytest.raises(RecipeError, match="gpus='99', but this machine has no CUDA device: leave gpus out"):
        SimEnv(gpus="99")


def test_libraries_that_look_for_gpus_as_they_are_imported_leave_cuda_to_the_scripts(
    run_job: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library/asks.py").write_text('import os\nSEEN = os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "library"), prepend=os.pathsep)
    script = """
        import os
        import asks
        import numpy as np
        import fedpool.client as flare
        flare.init()
        while flare.is_running():
            flare.receive()
            fits = asks.SEEN == "1" and "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ
            flare.send(flare.FLModel(params={"w": np.full(3, fits, np.float32)}))
    """
    assert float(run_job(script, num_rounds=1).get_result().params["w"][0]) == 1


def test_many_sites_share_slots_and_each_round_starts_fresh_scripts(run_job: Callable[..., Run]) -> None:
    env = {"num_clients": 70, "num_threads": 2, "keep_alive": False}
    result = run_job(env=env, min_clients=70, num_rounds=2).get_result()
    assert [len(record["accepted"]) for record in result.rounds] == [70, 70]
    assert float(result.params["w"][0]) == 2


def test_a_failing_site_among_many_is_named(run_job: Callable[..., Run]) -> None:
    script = """
        import fedpool.client as flare
        flare.init()
        while flare.is_running():
            model = flare.receive()
            if flare.get_site_name() == "site-66":
                raise ValueError("only here")
            flare.send(flare.FLModel(params=model.params))
    """
    env = {"num_clients": 66, "num_threads": 2, "keep_alive": False}
    result = run_job(script, env=env, min_clients=60, num_rounds=1).get_result()
    assert [entry["site"] for entry in result.rounds[0]["failed"]] == ["site-66"]


WAITS = """
    import threading
    import fedpool.client as flare
    flare.init()
    while flare.is_running():
        model = flare.receive()
        if model.current_round == 1:
            threading.Event().wait()
        flare.send(flare.FLModel(params=model.params))
"""


def test_status_and_abort_work_from_another_thread_while_the_job_runs(run_job: Callable[..., Run]) -> None:
    run = run_job(WAITS, wait=False)
    assert run.get_status() is JobStatus.RUNNING
    with pytest.raises(TimeoutError, match="is still running"):
        run.get_result(timeout=0.01)
    while run.get_progress().num_committed < 1:
        assert not run.wait(0.05)
    aborter = threading.Thread(target=run.abort)
    aborter.start()
    assert run.wait(300)
    aborter.join()
    assert run.get_status() is JobStatus.CANCELLED
    with pytest.raises(JobCancelled, match="cancelled after 1 rounds"):
        run.get_result()
    run.abort()  # harmless


def test_a_job_that_is_aborted_at_once_is_cancelled_too(run_job: Callable[..., Run]) -> None:
    run = run_job(WAITS, wait=False)
    run.abort()
    assert run.wait(300) and run.get_status() is JobStatus.CANCELLED


def test_jobs_at_the_same_time_do_not_get_in_each_others_way(run_job: Callable[..., Run]) -> None:
    runs = [run_job(wait=False) for _ in range(3)]
    assert [float(run.get_result(120).params["w"][0]) for run in runs] == [2, 2, 2]
    assert len({run.job_id for run in runs}) == 3


def test_the_environment_refuses_a_recipe_that_does_not_fit(run_job: Callable[..., Run]) -> None:
    for fields, message in (
        ({"min_clients": 3}, "min_clients=3, but the environment has 2 sites"),
        ({"clients_per_round": 3}, "clients_per_round=3, but the environment has 2 sites"),
        ({"per_site_config": {"site-9": {}}}, "per_site_config names site-9"),
        ({"aggregation_weights": {"site-9": 1}}, "aggregation_weights names site-9"),
    ):
        with pytest.raises(RecipeError, match=message):
            run_job(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_clients": 0}, "greater than or equal to 1"),
        ({"gpus": "0;1"}, "not a list of device numbers"),
        ({"clients": ["../etc"]}, "cannot be part of a path"),
        ({"clients": ["a", "a"]}, "distinct names"),
        ({"clients": ["a", "A"]}, "differ only in case"),
        ({"clients": ["nul", "b"]}, "client 'nul' is the name of a device"),
        ({"clients": ["a"], "num_clients": 2}, "give only one of the two"),
        ({"num_client": 2}, r"num_client: did you mean num_clients\?"),
    ],
)
def test_a_wrong_environment_is_refused_when_it_is_built(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SimEnv(**fields)


def test_the_number_of_sites_follows_from_the_recipe_when_the_environment_does_not_say(
    write_script: Callable[..., Path],
) -> None:
    recipe = FedAvgRecipe(
        name="n", model={"w": np.zeros(1)}, train_script=write_script("pass"), min_clients=3, num_rounds=1
    )
    assert SimEnv().site_names(recipe) == ("site-1", "site-2", "site-3")


def test_progress_read_by_many_threads_counts_each_round_once(run_job: Callable[..., Run]) -> None:
    run = run_job(num_rounds=4)
    threads = [threading.Thread(target=run.get_progress) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    progress = run.get_progress()
    assert progress.num_committed == 4
    assert progress.last_record is not None and progress.last_record.round == 3
