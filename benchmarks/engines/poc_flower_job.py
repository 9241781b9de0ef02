"""Engine: a Flower app on its deployment engine: a SuperLink and a SuperNode per site, insecure, on
the loopback interface.

All run with Flower's defaults: a SuperNode starts a process for every message, so in every round.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from shared import job_arguments

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
PROJECT = """
[project]
name = "bench"
version = "1.0.0"
description = "The benchmark's job"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "bench_app:server"
clientapp = "bench_app:client"
"""
STARTUP_S = 60.0


def main() -> None:
    """Start the processes, run the app, stop the processes."""
    arguments = job_arguments()
    workspace = Path(arguments.workspace)
    app = _write_app(workspace / "app", arguments)
    # Flower's processes find their programs on PATH; the app imports its modules from here.
    os.environ |= {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(HERE), "HOME": str(workspace)}
    port = _free_port()
    home = Path(os.environ["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{port}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "poc"\n\n[superlink.poc]\naddress = "{address}"\ninsecure = true\n', encoding="utf-8"
    )
    with contextlib.ExitStack() as stack:
        link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        stack.enter_context(_running([*link, "--disable-runtime-dependency-installation"]))
        _wait_for(port)
        for site in range(arguments.sites):
            node = ["flower-supernode", "--insecure", "--superlink", address, "--port", str(_free_port())]
            config = f"partition-id={site} num-partitions={arguments.sites}"
            stack.enter_context(_running([*node, "--node-config", config]))
        subprocess.run([BIN / "flwr", "run", str(app), "poc", "--stream"], check=True)


def _write_app(folder: Path, arguments: Namespace) -> Path:
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    job = f'"{arguments.workload}", {arguments.sites}'
    (folder / "bench_app.py").write_text(
        "from flower_apps import build_client, build_server\n\n"
        f"client = build_client({job})\nserver = build_server({job}, {arguments.rounds})\n",
        encoding="utf-8",
    )
    return folder


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen([BIN / command[0], *command[1:]])
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + STARTUP_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline:
            sys.exit(f"the SuperLink was not listening after {STARTUP_S:g} s")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
