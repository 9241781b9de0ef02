"""A private Prefect server for one run: its own process, an in-memory database, a free local port.

The database is in memory because with a SQLite file the server answers 503 to subflows that are
created just after tasks finish. Background services that a simulation does not need are off, which
leaves the processors to the training.
"""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedpool.errors import ServerError
from fedpool.patience import pauses
from fedpool.refusals import explained

STARTUP_TIMEOUT_S = 180.0
"""Starting takes five to ten seconds on an idle machine, and far longer on a busy one."""

IN_MEMORY = "sqlite+aiosqlite:///:memory:"

_UNUSED_SERVICES = (
    "SCHEDULER",
    "LATE_RUNS",
    "CANCELLATION_CLEANUP",
    "FOREMAN",
    "PAUSE_EXPIRATIONS",
    "REPOSSESSOR",
    "TRIGGERS",
    "EVENT_PERSISTER",  # the event feed, which is not used here, is half of a round's cost on the server
)

_BATCHES = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "64",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "64",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}
"""Task states in the UI may be a second old: recording them one by one makes rounds slow."""


class PrivateServer:
    """A Prefect server that ends when it is closed, or when this process ends."""

    def __init__(self) -> None:
        with explained(tempfile.gettempdir()):
            self._home = tempfile.TemporaryDirectory(prefix="fedpool-prefect-")
        self._output = Path(self._home.name) / "server.log"
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        self.api_url = f"{self.address}/api"
        environment = {
            **server_environment(Path(self._home.name)),
            **{f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in _UNUSED_SERVICES},
            **_BATCHES,
        }
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                server_command(port),
                env=environment,
                stdin=subprocess.PIPE,  # when it closes, the server knows that this process is gone, even if killed
                stdout=output,
                stderr=output,
                start_new_session=True,  # this process handles Ctrl-C, and the job must still report its end
            )

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            ServerError: the server ended, or does not answer within `STARTUP_TIMEOUT_S`.
        """
        wait_until_up(self.api_url, self._process, self._output)

    def close(self) -> None:
        """End the server and remove its folder. Idempotent.

        The server is killed, because it has nothing to save: its database is in memory.
        """
        self._process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._home.cleanup()


def wait_until_up(api_url: str, process: "subprocess.Popen[bytes]", output: Path) -> None:
    """Wait until a starting server answers.

    Args:
        output: path of its output, for the error message.

    Raises:
        ServerError: the server ended, or does not answer within `STARTUP_TIMEOUT_S`.
    """
    import httpx  # imported only once the process has started, because it takes a while

    def tail() -> str:
        return "\n".join(output.read_text(errors="replace").splitlines()[-20:])

    with httpx.Client(trust_env=False) as client:
        for pause_s in pauses(STARTUP_TIMEOUT_S, 0.05):
            try:
                if client.get(f"{api_url}/health").status_code == 200:
                    return
            except httpx.TransportError:  # not yet
                if process.poll() is not None:
                    raise ServerError(f"the Prefect server ended while starting:\n{tail()}") from None
            with suppress(subprocess.TimeoutExpired):  # returns at once when the process ends
                process.wait(pause_s)
    raise ServerError(f"the Prefect server did not answer within {STARTUP_TIMEOUT_S:g} s:\n{tail()}")


def server_environment(home: Path, database: str = IN_MEMORY) -> dict[str, str]:
    """The environment of a server's process: this one's without Prefect settings, and our own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    return environment | {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": str(database != IN_MEMORY).lower(),  # see server_process
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": "/api",
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
        # Otherwise the server imports every installed Prefect collection, only to find that there
        # is nothing to register.
        "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        # Otherwise a library that Prefect uses for scheduling compiles type checks for every call.
        "PY_KEY_VALUE_DISABLE_BEARTYPE": "true",
        "DO_NOT_TRACK": "1",
    }


def free_port() -> int:
    """A free port on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def server_command(port: int) -> list[str]:
    """The command of a server's process; see `server_process`."""
    return [sys.executable, "-m", "fedpool.deployments.server_process", str(port), str(_cache_folder())]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fedpool"


@contextmanager
def private_server() -> Iterator[PrivateServer]:
    """A private server that is starting: call `wait()` before you use it."""
    server = PrivateServer()
    try:
        yield server
    finally:
        server.close()
