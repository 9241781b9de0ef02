"""A proof of concept's background processes are found again, and are stopped with everything that
they started, even while they exit by themselves.
"""

import signal
import sys
from pathlib import Path

import psutil

from fedpool import PocEnv
from fedpool.deployments.daemons import Processes, _family

_PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
child.wait()
"""


def started(processes: Processes) -> tuple[psutil.Process, psutil.Process]:
    parent = psutil.Process(processes.start("parent", [sys.executable, "-c", _PARENT], {}).pid)
    while not (line := processes.log("parent").read_text()).endswith("\n"):
        assert parent.is_running()
    return parent, psutil.Process(int(line))


def test_stop_ends_a_process_and_what_it_started(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    parent, child = started(processes)
    processes.stop(["parent"])
    gone, alive = psutil.wait_procs([parent, child], timeout=120)
    assert len(gone) == 2 and not alive
    assert processes.find("parent") is None
    processes.stop(["parent"])  # harmless


def test_from_a_shells_background_processes_still_hear_sigint(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        parent, child = started(processes)
    finally:
        signal.signal(signal.SIGINT, before)
    assert processes.find("parent") is not None
    parent.send_signal(signal.SIGINT)
    parent.wait(300)
    child.kill()
    assert "KeyboardInterrupt" in processes.log("parent").read_text()


def test_a_process_that_ends_meanwhile_is_a_family_of_one(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    parent, child = started(processes)
    child.kill()
    processes.stop(["parent"])
    psutil.wait_procs([parent, child], timeout=120)
    assert _family(parent) == [parent]


def test_the_folder_of_a_proof_of_concept_is_expanded() -> None:
    """If no folder was given, the default was once used literally, `~` included."""
    assert PocEnv(num_clients=1).home == Path.home() / ".fedpool/poc"
    assert PocEnv(num_clients=1, home=Path("~/other")).home == Path.home() / "other"
