"""What users are told next to a job's table: a missing metric, weights of 0, who failed and why."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedpool import FedAvgRecipe, JobFailed, JobStatus, Run, SimEnv
from fedpool.cli import main

SCRIPT = """
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        if {fails}:
            raise ValueError("no luck")
        flare.send(flare.FLModel(params=model.params, metrics={{"acuracy": 0.5}}, meta={{"NUM_STEPS_CURRENT_ROUND": {weight}}}))
"""


def script(fails: str = "False", weight: str = "1") -> str:
    return SCRIPT.format(fails=fails, weight=weight)


def shown(run: Run, capsys: pytest.CaptureFixture[str]) -> str:
    """What `fedpool job show` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["job", "show", run.job_id, "--store", str(Path(run.path).parent)])
    return capsys.readouterr().out


def test_a_stop_condition_on_a_misspelt_metric_fails_the_job_after_its_first_round(run_job: Callable[..., Run]) -> None:
    run = run_job(script(), num_rounds=50, stop_cond="accuracy >= 0.4")
    assert run.get_progress().num_committed == 1
    with pytest.raises(
        JobFailed, match=r"needs the metric 'accuracy'.*reported the metric acuracy: the script sends 'acuracy'"
    ):
        run.get_result()


def test_a_job_of_an_earlier_version_goes_on_though_a_metric_that_was_chosen_is_missing(
    run_job: Callable[..., Run], tmp_path: Path
) -> None:
    down = tmp_path / "down"
    down.touch()
    text = script(fails=f"__import__('pathlib').Path({str(down)!r}).exists()")
    lost = run_job(text, stop_cond="accuracy >= 0.4", site_retries=0)
    path = Path(lost.path) / "job.json"
    described = json.loads(path.read_text())
    del described["given"]  # earlier versions didn't write it
    path.chmod(0o600)
    path.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    down.unlink()
    kept = {
        name: described["recipe"][name] for name in ("name", "min_clients", "num_rounds", "stop_cond", "site_retries")
    }
    recipe = FedAvgRecipe(**kept, model={"w": np.zeros(3, np.float32)}, train_script=tmp_path / "client.py")
    env = SimEnv(num_clients=2, workspace=tmp_path / "runs", progress=False)
    assert recipe.execute(env, resume=lost.job_id).get_result().num_rounds == 2


def test_a_key_metric_that_nobody_chose_is_a_warning_in_the_terminal_and_in_job_show(
    run_job: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_job(script(), env={"progress": True})
    words = "the key metric 'accuracy' is missing, so the last model counts as the best. In round 0 sites reported the metric acu"
    assert run.get_status() is JobStatus.COMPLETED
    assert words in capsys.readouterr().out
    assert words in shown(run, capsys)


def test_a_job_without_metrics_is_told_nothing(run_job: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = run_job(env={"progress": True})
    assert "metric '" not in capsys.readouterr().out
    assert "metric '" not in shown(run, capsys)


def test_weights_that_are_all_0_are_told_with_their_cause(
    run_job: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_job(script(weight="0"), env={"progress": True})
    words = "rounds 0-1: every update has weight 0, so the model stays as it is: site-1, site-2 sent NUM_STEPS_CURRENT_ROUND 0"
    assert words in capsys.readouterr().out
    assert words in shown(run, capsys)


def test_who_failed_and_why_stands_under_the_table_once_and_with_the_users_file(
    run_job: Callable[..., Run], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fails = "model.current_round > 0 and flare.get_site_name() != 'site-3'"
    run = run_job(script(fails=fails), env={"num_clients": 3, "progress": True}, min_clients=1, num_rounds=3)
    assert run.get_status() is JobStatus.COMPLETED
    for out in (capsys.readouterr().out, shown(run, capsys)):
        assert "site-1, site-2 (rounds 1-3) failed: the script ended with exit code 1" in out
        assert out.count("ValueError: no luck") == 1
        assert f'File "{tmp_path}/client.py", line 8' in out and ".fedpool-sites-" not in out


def test_the_error_of_a_job_that_failed_tells_an_equal_cause_once(run_job: Callable[..., Run], tmp_path: Path) -> None:
    run = run_job(script(fails="True"), env={"num_clients": 3}, min_clients=3, round_retries=1)
    with pytest.raises(JobFailed) as failed:
        run.get_result()
    message = str(failed.value)
    assert "site-1, site-2, site-3 failed: the script ended with exit code 1" in message
    assert message.count("ValueError: no luck") == 1
    assert f'File "{tmp_path}/client.py", line 8' in message


def test_a_submission_that_failed_is_told_with_its_cause(
    run_job: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run_job(script(fails="flare.is_submit_model()"), env={"progress": True}, cross_site_eval=True)
    out = capsys.readouterr().out
    assert "0/2" in out and "site-1, site-2 (round 3) failed: the script ended with exit code 1" in out
