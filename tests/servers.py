"""Prefect servers with all background services, for tests that need more than `prefect_api`."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from fedpool.deployments.access import Access
from fedpool.deployments.server import (
    IN_MEMORY,
    free_port,
    listening,
    server_command,
    server_environment,
    wait_until_up,
)


@contextmanager
def prefect_program(folder: Path, environment: Mapping[str, str], *command: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run the stock `prefect` command in a process whose output goes to FOLDER/log."""
    folder.mkdir()
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *command], env=environment, cwd=folder, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(300)


@contextmanager
def stock_server(folder: Path) -> Iterator[Access]:
    """Prefect's own server, as an operator starts it: it answers to every host name."""
    access = Access.new(free_port())
    environment = server_environment(folder, access) | {"PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "true"}
    command = ("server", "start", "--host", "127.0.0.1", "--port", str(access.port))
    with prefect_program(folder, environment, *command) as process:
        wait_until_up(access.api_url, process, folder / "log")
        yield access


@contextmanager
def prefect_server(
    home: Path,
    database: str = IN_MEMORY,
    access: Access | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Access]:
    """A server that answers; yields its address and password, which no setting has yet.

    Args:
        home: its folder, where it leaves its output in `log`.
        access: the address and the password to use; default: new ones.
        variables: more variables of its environment.
    """
    access = access or Access.new(free_port())
    home.mkdir(parents=True, exist_ok=True)
    with (home / "log").open("wb") as output, listening(access.port) as door:
        process = subprocess.Popen(
            server_command(door),
            env=server_environment(home, access, database) | dict(variables or {}),
            pass_fds=[door.fileno()],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
    assert process.stdin is not None
    with closing(process.stdin):
        try:
            wait_until_up(access.api_url, process, home / "log")
            yield access
        finally:
            process.kill()
            process.wait()
