"""`PocEnv`: a proof of concept on this machine: a Prefect server, a coordinator, and its sites.

It has everything that production has, on one machine. `up` starts what is not running (so it also
repairs), `down` ends everything; the results stay. The processes outlive the command that started
them, and are recorded in the folder `home`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from fedpool import exclusive
from fedpool.backend import normal_url
from fedpool.deployments.clients import NamedClients
from fedpool.deployments.poc_services import Service, Services
from fedpool.deployments.poc_state import PocState
from fedpool.deployments.remote import RemoteEnv
from fedpool.errors import ConfigError, RecipeError
from fedpool.loopback import bypass_proxies
from fedpool.paths import check_folder
from fedpool.recipe import Recipe
from fedpool.refusals import explained
from fedpool.store import Store
from fedpool.tasks.job_record import EnvironmentRecord

DEFAULT_HOME = Path("~/.fedpool/poc")
_LOG = logging.getLogger("fedpool.poc")


class PocEnv(RemoteEnv, NamedClients):
    """A proof of concept on this machine. `execute` starts it if needed, and leaves it running.

    Raises:
        RecipeError (also a pydantic.ValidationError): a field is invalid.
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
        description="folder for the processes' logs, the sites' folders and the store",
        validate_default=True,  # the default begins with ~
    )

    @field_validator("home")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return check_folder("home", value.expanduser().absolute())

    @model_validator(mode="after")
    def _one_way_to_name_the_store(self) -> Self:
        if self.s3 and self.store is not None:
            raise RecipeError(f"s3=True starts its own store, but store={self.store!r}: give only one of the two")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites."""
        return self.names_or(2)

    def site_names(self, recipe: Recipe) -> tuple[str, ...]:
        return self.names

    def prepare(self, recipe: Recipe) -> None:
        """See `RemoteEnv.prepare`: starts what is not running."""
        self.up()

    def open_store(self) -> Store:
        state = PocState.read(self.home)
        return Store(state.store, **state.storage_options)

    def recorded(self) -> EnvironmentRecord:
        """See `RemoteEnv.recorded`: adds the folder, which identifies the proof of concept."""
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
            ConfigError: no proof of concept is up.
        """
        return PocState.read(self.home).api_url

    @property
    def ui_url(self) -> str:
        """URL of the Prefect UI."""
        return PocState.read(self.home).address

    def is_up(self) -> bool:
        """Whether it is up."""
        return PocState.path(self.home).exists()

    def environment(self) -> dict[str, str]:
        """Variables with which other programs reach the server and the store, with `s3` its keys.

        Raises:
            ConfigError: no proof of concept is up.
        """
        state = PocState.read(self.home)
        return {"PREFECT_API_URL": state.api_url, "FEDPOOL_STORE": state.store, **state.environment}

    def up(self) -> None:
        """Start the server, store, coordinator and sites that do not run; wait until all answer.

        Idempotent.

        Raises:
            ServerError: a process did not start; the message ends with its output.
            ConfigError: a proof of concept with other settings is up, or a program is missing.
        """
        bypass_proxies()  # the processes inherit this
        with self._locked():
            # In one form, because the workers have other current folders and compare it with jobs'.
            store = self.store and normal_url(self.store)
            state = PocState.reconcile(self.home, database=self.database, store=store, s3=self.s3)
            self._services.start(state, self.names, self.coordinator_pool)

    def down(self) -> None:
        """End all processes; the results stay. Idempotent."""
        if not self.home.exists():
            return
        with self._locked():
            self._services.stop()
            PocState.path(self.home).unlink(missing_ok=True)

    def status(self) -> list[Service]:
        """Every process, with whether it runs and is healthy; empty if nothing is up."""
        try:
            state = PocState.read(self.home)
        except ConfigError:
            return []
        return self._services.status(state, self.coordinator_pool)

    def log(self, name: str) -> Path:
        """Path of a process's output.

        Raises:
            ConfigError: there is no such process.
        """
        return self._services.log(name)

    @property
    def _services(self) -> Services:
        return Services(self.home)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with explained(self.home):
            self.home.mkdir(parents=True, exist_ok=True)
            with exclusive.locked(self.home, _LOG.warning, wait=True):
                yield
