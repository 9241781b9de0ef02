"""Prefect servers with all background services, for tests that need more than `prefect_api`."""

import subprocess
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
