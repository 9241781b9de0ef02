"""A user's `job.py` in its own process: the private server, Ctrl-C, and what is left when the
process is killed.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

CLIENT = """
import pathlib, threading
import fedpool.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    if model.current_round == {hang_at}:
        pathlib.Path("hanging-" + flare.get_site_name()).touch()
        threading.Event().wait()
    flare.send(flare.FLModel(params={{"w": model.params["w"] + 1}}, metrics={{"accuracy": 0.5}}))
"""
# No `if __name__ == "__main__"` guard: a user's job.py needs none.
JOB = """
import numpy as np
from fedpool import FedAvgRecipe, SimEnv

recipe = FedAvgRecipe(name="own", min_clients=2, num_rounds=2, model={"w": np.zeros(3)}, train_script="client.py")
run = recipe.execute(env=SimEnv(num_clients=2))
print("status", run.get_status())
"""


@pytest.fixture
def job_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A `python job.py` without a configured Prefect API, whose sites hang in round 1; round 0 is
    over when the test begins.
    """
    process = start(tmp_path, hang_at=1)
    wait_until(lambda: len(list(tmp_path.glob("hanging-*"))) == 2, process)
    yield process
    process.kill()
    process.communicate()


def start(folder: Path, *, hang_at: int) -> subprocess.Popen[str]:
    (folder / "client.py").write_text(CLIENT.format(hang_at=hang_at))
    (folder / "job.py").write_text(JOB)
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    return subprocess.Popen(
        [sys.executable, "job.py"],
        cwd=folder,
        env=environment
        | {"PREFECT_HOME": str(folder / "prefect"), "TMPDIR": str(tmp(folder)), "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process: subprocess.Popen[str], timeout_s: float = 120) -> str:
    """Everything that a process prints; one that hangs is aborted and prints its threads."""
    try:
        return process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        raise AssertionError(f"it hangs:\n{process.communicate(timeout=120)[0]}") from None


def tmp(folder: Path) -> Path:
    """The job's own temporary folder, with a short path, to see what the job leaves there."""
    path = folder / "t"
    path.mkdir(exist_ok=True)
    return path


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
            raise AssertionError(f"it ended early: {process.communicate()[0]}")


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Every process that the job started: server, zygote, scripts."""
    found: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    return found


def test_a_job_brings_its_own_server_names_its_address_and_takes_it_down(tmp_path: Path) -> None:
    process = start(tmp_path, hang_at=-1)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "status COMPLETED" in output
    address = output.split("Prefect UI during the run: ")[1].split()[0]
    with pytest.raises(httpx.ConnectError):
        httpx.get(address, trust_env=False)
    result = json.loads(next(tmp_path.glob("fedpool-runs/*/result.json")).read_text())
    assert result["final"]["path"] in output  # the path of the model
    assert "evaluate" in output  # the table of the rounds
    assert "own: 3 rounds done" in output and "Beginning flow run" not in output  # Prefect's log is in the UI
    assert not list(tmp(tmp_path).iterdir())
    assert [path.name for path in tmp_path.glob("fedpool-runs/.*")] == []


def test_ctrl_c_ends_the_sessions_and_leaves_a_job_that_says_it_was_cancelled(
    job_process: subprocess.Popen[str], tmp_path: Path
) -> None:
    started = family(job_process)
    assert len(started) >= 4  # a server, a zygote, two scripts
    job_process.send_signal(signal.SIGINT)
    output = output_of(job_process)
    assert job_process.returncode != 0 and "cancelled after 1 rounds" in output
    result = json.loads(next(tmp_path.glob("fedpool-runs/*/result.json")).read_text())
    assert result["status"] == "CANCELLED" and result["final"]["round"] == 1
    assert psutil.wait_procs(started, timeout=120)[1] == []
    assert not list(tmp(tmp_path).iterdir())


def test_a_killed_coordinator_leaves_no_process_behind(job_process: subprocess.Popen[str]) -> None:
    started = family(job_process)
    job_process.kill()
    job_process.wait()
    assert psutil.wait_procs(started, timeout=400)[1] == []


def test_a_killed_zygote_fails_the_round_and_its_scripts_are_gone(job_process: subprocess.Popen[str]) -> None:
    zygote = next(
        p for p in family(job_process) if "fedpool.sites.zygote_process" in p.cmdline() and p.ppid() == job_process.pid
    )
    scripts = zygote.children()
    zygote.kill()
    output = output_of(job_process)
    assert "status FAILED" in output and "killed by SIGKILL" in output
    assert psutil.wait_procs(scripts, timeout=400)[1] == []
