"""Shared by the tests of sites behind work pools: jobs that wait for a file, the stock Prefect
command, and a search for processes by home folder.
"""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fedpool import FedAvgRecipe, JobStatus, PocEnv, Run
from fedpool.environment import Environment

# Adds 1 to what it receives. In the rounds `hold`, it reports that it is training, and continues
# when there is a file `go` or `go-ROUND`.
GATED = """
    import pathlib, threading
    import fedpool.client as flare

    flare.init()
    config = flare.get_config()
    folder, hold = pathlib.Path(config["folder"]), config["hold"]
    while flare.is_running():
        model = flare.receive()
        if model.current_round in hold:
            print("training in round", model.current_round)
            (folder / f"training-{flare.get_site_name()}").touch()
            (folder / f"training-{flare.get_site_name()}-{model.current_round}").touch()
            while not ((folder / "go").exists() or (folder / f"go-{model.current_round}").exists()):
                threading.Event().wait(0.05)
        flare.send(flare.FLModel(params={name: value + 1 for name, value in model.params.items()}))
"""


class GatedJob:
    """A recipe whose sites hold in one round until they are released.

    Args:
        folder: the test's folder.
        sites: names of the sites.
        hold: the round or rounds in which they hold.
        fields: fields of the recipe.
    """

    def __init__(self, folder: Path, sites: tuple[str, ...], *, hold: int | tuple[int, ...] = 1, **fields: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "client.py"
        script.write_text(textwrap.dedent(GATED))
        self._folder = folder
        self._sites = sites
        config: dict[str, Any] = {"folder": str(folder), "hold": [hold] if isinstance(hold, int) else list(hold)}
        defaults: dict[str, Any] = {"name": "gated", "min_clients": len(sites), "num_rounds": 3}
        self.recipe = FedAvgRecipe(
            **defaults
            | {
                "model": {"w": np.zeros(3, np.float32)},
                "train_script": script,
                "per_site_config": dict.fromkeys(sites, config),
            }
            | fields
        )

    @contextmanager
    def started(self, env: Environment[Run]) -> Iterator[Run]:
        """Start the job, and make sure that it has ended when the block ends."""
        run = self.recipe.execute(env=env, wait=False)
        try:
            yield run
        finally:
            run.abort()
            assert run.wait(300)

    def wait_until_held(self, run: Run, *, round: int | None = None, sites: Sequence[str] | None = None) -> None:
        """Block until all sites, or the given ones, hold; in the given round, if there is one."""
        suffix = "" if round is None else f"-{round}"
        held = [self._folder / f"training-{site}{suffix}" for site in sites or self._sites]
        wait_until(
            lambda: all(path.exists() for path in held),
            timeout_s=400,
            over=lambda: run.get_status() is not JobStatus.RUNNING,
        )

    def release(self, round: int | None = None) -> None:
        """Let the sites continue to the end, or past one round."""
        (self._folder / ("go" if round is None else f"go-{round}")).touch()


class Worker:
    """A worker's process.

    Args:
        command: the arguments after `python -m`.
        folder: its working directory; it prints to the file `log` there.
    """

    def __init__(self, api_url: str, folder: Path, *command: str, **variables: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._log = folder / "log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "FEDPOOL_"))}
        environment |= {
            "PREFECT_API_URL": api_url,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_WORKER_HEARTBEAT_SECONDS": "3",
        }
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=folder,
                env=environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_until_started(self) -> "Worker":
        wait_until(lambda: "started!" in self.log, timeout_s=400, over=lambda: self.process.poll() is not None)
        return self

    def end(self) -> None:
        """Send SIGTERM, then kill what is left: a test must check for leftovers before."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(300)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in processes_of(self.folder):
            process.kill()


@contextmanager
def brought_up(env: PocEnv) -> Iterator[PocEnv]:
    """A proof of concept that is up during the block; none of its processes is left afterwards."""
    try:
        env.up()
        yield env
    finally:
        env.down()
        wait_until_gone(processes_of, env.home, 60)


def wait_until(condition: Callable[[], object], *, timeout_s: float = 120, over: Callable[[], object] = bool) -> float:
    """Block until a condition holds; returns the seconds that it took. Fails after `timeout_s`, or
    when `over` holds first.
    """
    began = time.monotonic()
    pause = threading.Event()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"did not come in {timeout_s:g} s"
        assert not over(), "it ended before that"
        pause.wait(0.05)
    return time.monotonic() - began


def prefect(api_url: str, home: Path, *arguments: str, timeout_s: float = 240) -> "subprocess.CompletedProcess[str]":
    """Run the stock Prefect command."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "FEDPOOL_"))}
    return subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        env=environment
        | {"PREFECT_API_URL": api_url, "PREFECT_HOME": str(home), "DO_NOT_TRACK": "1", "COLUMNS": "400"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process that has the folder in its command line or in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if process.pid != os.getpid() and any(str(folder) in word for word in words):
            found.append(process)
    return found


def scripts_of(folder: Path) -> list[psutil.Process]:
    """The processes of a folder that are client scripts or their guards."""
    found = []
    for process in processes_of(folder):
        try:
            if any(word in ("fedpool.sites.script", "fedpool.sites.script_process") for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until_gone(find: Callable[[Path], list[psutil.Process]], folder: Path, timeout_s: float = 10) -> None:
    """Block until none is left: a killed process still exists for a moment."""
    wait_until(lambda: not find(folder), timeout_s=timeout_s)
