"""`fedpool job`: the command that users type to read from the store what ran."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from fedpool import ConfigError, PocEnv, Run, Store
from fedpool.cli import main
from fedpool.deployments.stored_jobs import list_jobs, read_job
from tests.services import S3Server

SCORED = """
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        flare.send(flare.FLModel(params=model.params, metrics={"accuracy": 0.5}))
"""
FAILING = "raise ValueError('no luck')"


def fedpool(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints. It must exit with 0."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


def test_list_shows_the_jobs_newest_first(
    run_job: Callable[..., Run], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, second = run_job(SCORED, name="first"), run_job(FAILING, name="second", num_rounds=1)
    listed = json.loads(fedpool(capsys, "job", "list", "--json", "--store", str(tmp_path / "runs")))
    assert [(job["job_id"], job["status"], job["num_committed"]) for job in listed] == [
        (second.job_id, "FAILED", 0),
        (first.job_id, "COMPLETED", 2),
    ]
    assert listed[1]["metrics"] == {"accuracy": 0.5}
    table = fedpool(capsys, "job", "list", "--store", str(tmp_path / "runs"))
    assert first.job_id in table and second.job_id in table


def printed_to_a_terminal(columns: int, *arguments: str) -> str:
    """What the command prints to a terminal of this width, without colours."""
    ours, its = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fedpool.cli", *arguments], env=environment, stdin=its, stdout=its
    )
    os.close(its)
    text = b""
    with contextlib.suppress(OSError):  # raised at the end of a terminal's output
        while chunk := os.read(ours, 1 << 16):
            text += chunk
    os.close(ours)
    assert process.wait(300) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", text.decode())


def test_list_cuts_nothing_off_a_terminal_and_no_id_on_one(run_job: Callable[..., Run], tmp_path: Path) -> None:
    script = SCORED.replace('{"accuracy": 0.5}', "{f'metric_with_a_long_name_{n}': n for n in range(6)}")
    run = run_job(script, name="a-name-as-long-as-a-name-may-be", num_rounds=1, key_metric="metric_with_a_long_name_1")
    arguments = ("job", "list", "--store", str(tmp_path / "runs"))
    piped = subprocess.run(
        [sys.executable, "-m", "fedpool.cli", *arguments], capture_output=True, text=True, check=True
    )
    (line,) = [line for line in piped.stdout.splitlines() if run.job_id in line]
    assert "FedAvgRecipe" in line and "metric_with_a_long_name_5 5" in line and "…" not in piped.stdout
    for columns in (80, 50):
        shown = printed_to_a_terminal(columns, *arguments)
        assert run.job_id in shown and "…" not in shown


def test_a_job_that_cannot_be_read_does_not_hide_the_others(
    run_job: Callable[..., Run], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, runs = run_job(), tmp_path / "runs"
    for name, text in (("damaged", "{"), ("older", '{"recipe": {}}')):
        (runs / name).mkdir()
        (runs / name / "job.json").write_text(text)
    listed = json.loads(fedpool(capsys, "job", "list", "--json", "--store", str(runs)))
    unreadable = {job["job_id"]: job["unreadable"] for job in listed}
    assert unreadable[run.job_id] is None
    assert (
        "is not JSON" in unreadable["damaged"]
        and "does not describe a job: job_id: Field required" in unreadable["older"]
    )
    table = fedpool(capsys, "job", "list", "--store", str(runs))
    assert table.count("unreadable") == 2 and run.job_id in table


def test_show_tells_rounds_and_models_and_why_it_failed(
    run_job: Callable[..., Run], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = run_job(SCORED, name="first")
    failed = run_job(FAILING, name="second", num_rounds=1)
    store = str(tmp_path / "runs")
    shown = fedpool(capsys, "job", "show", run.job_id, "--store", store)
    assert "COMPLETED" in shown and str(run.get_result().path) in shown
    as_json = json.loads(fedpool(capsys, "job", "show", run.job_id, "--json", "--store", store))
    assert len(as_json["rounds"]) == 3 and as_json["result"]["status"] == "COMPLETED"
    assert "ValueError: no luck" in fedpool(capsys, "job", "show", failed.job_id, "--store", store)


def test_a_job_that_is_not_there_is_named_with_those_that_are(run_job: Callable[..., Run], tmp_path: Path) -> None:
    run = run_job(SCORED)
    with pytest.raises(ConfigError, match=f"there is no job 'other'.*{run.job_id}"):
        read_job(Store(tmp_path / "runs"), "other")


def test_a_staged_template_is_no_job(tmp_path: Path, write_script: Callable[..., Path]) -> None:
    script = write_script(SCORED)
    (tmp_path / "job.py").write_text(
        "from fedpool import FedAvgRecipe\nimport numpy as np\n"
        f"script = {str(script)!r}\n"
        "recipe = FedAvgRecipe(name='t', min_clients=1, num_rounds=1, model={'w': np.zeros(2)}, train_script=script)\n"
        "if __name__ == '__main__':\n    raise SystemExit('it ran')\n"
    )
    store = tmp_path / "store"
    command = [sys.executable, "-m", "fedpool.cli", "job", "stage", str(tmp_path / "job.py"), "--store", str(store)]
    done = subprocess.run([*command, "--sites", "site-1"], capture_output=True, text=True, check=True)
    staged = done.stdout.strip()
    assert Store(store).read_json(f"{staged}/job.json")["template"] is True
    assert list_jobs(Store(store)) == []
    refused = subprocess.run([*command, "--sites", "a b"], capture_output=True, text=True)
    assert refused.returncode == 1 and "a b" in refused.stderr


def test_stage_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.py").write_text("recipe = 1\n")
    with pytest.raises(SystemExit) as ended:
        main(["job", "stage", f"{tmp_path / 'job.py'}", "--sites", "site-1", "--store", str(tmp_path)])
    assert ended.value.code == 1
    assert "has no recipe called 'recipe'" in capsys.readouterr().err


def test_a_setting_of_prefects_that_does_not_fit_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    settings = {**os.environ, "PREFECT_API_REQUEST_TIMEOUT": "soon"}
    command = [sys.executable, "-m", "fedpool.cli", "job", "cancel", "some-20261129-101010-abcdef"]
    done = subprocess.run(
        [*command, "--home", str(tmp_path)], env=settings, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("a Prefect setting is invalid (APISettings): request_timeout: Input should be a valid")
    assert last.endswith("correct the PREFECT_ variable or the profile that sets it")


@pytest.mark.parametrize("mistake", [ValueError("ours"), KeyError("ours"), TypeError("ours")])
def test_a_mistake_of_our_own_is_a_traceback(
    mistake: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PocEnv) -> None:
        raise mistake

    monkeypatch.setattr(PocEnv, "status", fail)
    with pytest.raises(type(mistake), match="ours"):
        main(["poc", "status", "--home", str(tmp_path)])


def test_the_command_says_where_nothing_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["poc", "status", "--home", str(tmp_path)])
    assert status.value.code == 1 and "nothing is up" in capsys.readouterr().out
    fedpool(capsys, "poc", "down", "--home", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["poc", "env", "--home", str(tmp_path)])
    assert ended.value.code == 1 and "fedpool poc up" in capsys.readouterr().err


def test_a_store_of_numpy_models_is_read_back(run_job: Callable[..., Run]) -> None:
    run = run_job(SCORED, model={"w": np.arange(3, dtype=np.float32)})
    summary, records, result = read_job(Store(Path(run.path).parent), run.job_id)
    assert summary.sites == ["site-1", "site-2"] and len(records) == 3 and result is not None


def test_the_store_that_is_meant_is_said_first_and_found_by_one_rule(
    run_job: Callable[..., Run], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_job(SCORED)
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "poc"

    def first_lines(*arguments: str) -> list[str]:
        return fedpool(capsys, "job", "list", *arguments, "--home", str(home)).splitlines()

    given = first_lines("--store", str(tmp_path / "runs"))
    assert given[0] == f"store: {tmp_path / 'runs'} (--store)" and any(run.job_id in line for line in given)
    assert first_lines() == [
        f"store: {tmp_path / 'fedpool-runs'} (the folder of simulations here)",
        "it has no jobs",
    ]
    (home / "store").mkdir(parents=True)
    assert first_lines()[1] == f"The proof of concept is down. For its jobs: --store {home / 'store'}"
    monkeypatch.setenv("FEDPOOL_STORE", str(tmp_path / "runs"))
    assert first_lines()[0] == f"store: {tmp_path / 'runs'} (FEDPOOL_STORE)"
    assert first_lines("--store", str(tmp_path / "other"))[0] == f"store: {tmp_path / 'other'} (--store)"
    for command in (("show", run.job_id), ("verify", run.job_id), ("replay", run.job_id)):
        shown = fedpool(capsys, "job", *command, "--home", str(home))
        assert shown.splitlines()[0] == f"store: {tmp_path / 'runs'} (FEDPOOL_STORE)"


def test_show_names_models_by_addresses_that_anybody_can_open(
    run_job: Callable[..., Run], capsys: pytest.CaptureFixture[str], s3_server: S3Server
) -> None:
    run = run_job(SCORED)
    there = Store(f"{s3_server.url}/jobs")
    for path in Path(run.path).rglob("*"):
        if path.is_file():
            there.write_bytes(f"{run.job_id}/{path.relative_to(run.path)}", path.read_bytes())
    shown = fedpool(capsys, "job", "show", run.job_id, "--store", there.url)
    assert f"final model: s3://bucket/jobs/{run.job_id}/rounds/00002/global.safetensors" in shown


LOST = """
from pathlib import Path

import numpy as np

from fedpool import FedAvgRecipe, SimEnv

FedAvgRecipe(
    name="lost", min_clients=2, num_rounds=2, model={"w": np.zeros(3, np.float32)}, train_script="client.py"
).execute(SimEnv(num_clients=2, workspace=Path("runs"), progress=False))
"""


def test_a_job_whose_process_is_gone_has_failed_and_one_that_goes_on_runs(
    prefect_api: str,
    write_script: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    write_script(SCORED)
    (tmp_path / "job.py").write_text(LOST)
    command = [sys.executable, "-m", "fedpool.testing", "--at", r"rounds/00001/round\.json", "job.py"]
    killed = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PREFECT_API_URL": prefect_api}, check=False)
    assert killed.returncode == -signal.SIGKILL
    store = ("--store", str(tmp_path / "runs"))
    (job,) = json.loads(fedpool(capsys, "job", "list", "--json", *store))
    assert (job["status"], job["ended"], job["num_committed"]) == ("FAILED", False, 1)
    shown = fedpool(capsys, "job", "show", job["job_id"], *store)
    assert f"{job['job_id']}: FAILED" in shown and "its process was lost" in shown
    assert f"resume it: fedpool job resume {job['job_id']}" in shown
    with Store(tmp_path / "runs").held(job["job_id"]):
        assert f"{job['job_id']}: RUNNING" in fedpool(capsys, "job", "show", job["job_id"], *store)
    assert "COMPLETED" in fedpool(capsys, "job", "resume", job["job_id"], *store)
    assert f"{job['job_id']}: COMPLETED" in fedpool(capsys, "job", "show", job["job_id"], *store)


@pytest.mark.parametrize(
    "arguments", [("job", "show", "{job}", "--json"), ("job", "list"), ("recipe", "show", "fedavg")]
)
def test_a_reader_that_has_read_enough_is_no_traceback(
    run_job: Callable[..., Run], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    run = run_job(SCORED)
    reader, writer = os.pipe()
    os.close(reader)
    words = [word.format(job=run.job_id) for word in arguments]
    environment = {**os.environ, "FEDPOOL_STORE": str(tmp_path / "runs")}
    command = [sys.executable, "-m", "fedpool.cli", *words]
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_a_command_that_needs_a_server_says_so_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        for command in ("cancel", "logs"):
            with pytest.raises(SystemExit) as ended:
                main(["job", command, "some-20261129-101010-abcdef", "--home", str(tmp_path)])
            assert ended.value.code == 1
            said = capsys.readouterr().err
            assert (
                said.startswith("no Prefect server is configured: set PREFECT_API_URL, or start a proof of concept")
                and said.count("\n") == 1
            )
