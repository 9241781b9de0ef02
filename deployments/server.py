"""A private Prefect server for one run: a process, a database in memory, a free local port, and a
random password.

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

from fedpool.deployments.access import Access
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
    """A Prefect server that ends when it is closed, or when this process ends.

    Attributes:
        access: its address and its password.
        link_file: path of a file that has the link to the UI, for its owner only.
    """

    def __init__(self) -> None:
        with explained(tempfile.gettempdir()):
            self._home = tempfile.TemporaryDirectory(prefix="fedpool-prefect-")  # for its owner only
        home = Path(self._home.name)
        self._output = home / "server.log"
        with listening() as door, self._output.open("wb") as output:
            self.access = Access.new(door.getsockname()[1])
            environment = {
                **server_environment(home, self.access),
                **{f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in _UNUSED_SERVICES},
                **_BATCHES,
            }
            self._process = subprocess.Popen(
                server_command(door),
                env=environment,
                pass_fds=[door.fileno()],
                stdin=subprocess.PIPE,  # when it closes, the server knows that this process is gone, even if killed
                stdout=output,
                stderr=output,
                start_new_session=True,  # this process handles Ctrl-C, and the job must still report its end
            )
        self.link_file = home / "ui-link"
        self.link_file.touch(mode=0o600)
        self.link_file.write_text(f"{self.access.link}\n")

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            ServerError: the server ended, or does not answer within `STARTUP_TIMEOUT_S`.
        """
        wait_until_up(self.access.api_url, self._process, self._output)

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


def server_environment(home: Path, access: Access, database: str = IN_MEMORY) -> dict[str, str]:
    """The environment of a server's process: this one's without Prefect settings, and our own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    return environment | {
        **access.server_environment,
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


def listening(port: int = 0) -> socket.socket:
    """A socket that listens on the loopback, for a server's process to inherit. Close it here then.

    It listens before anyone knows the port. If the server took the port itself once it has started,
    seconds later, another user could take it first, and would be sent the password.

    Args:
        port: the port; 0: any that is free.

    Raises:
        ServerError: another program has the port.
    """
    door = socket.socket()
    try:
        if port:  # of a server that has ended: the system remembers its connections for a minute
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(("127.0.0.1", port))
        door.listen(2048)
    except OSError as error:
        door.close()
        raise ServerError(f"cannot listen on port {port} of 127.0.0.1: {error.strerror}") from None
    return door


def server_command(door: socket.socket) -> list[str]:
    """The command of a server's process; see `server_process`. Pass it the socket (`pass_fds`)."""
    return [sys.executable, "-m", "fedpool.deployments.server_process", str(door.fileno()), str(_cache_folder())]


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
