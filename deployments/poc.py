"""`PocEnv`: a proof of concept on this machine. A Prefect server, a coordinator's worker and a
worker process per site.

Everything that production has, on one machine: `up` starts what does not run yet (so it also
heals), `down` ends all of it, the results stay. The processes outlive the command that started
them; who they are is kept in the folder `home`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from fedpool import exclusive
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
        state = PocState.read(self.home)
        return Store(state.store, **state.storage_options)

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
        return PocState.read(self.home).api_url

    @property
    def ui_url(self) -> str:
        """URL of the Prefect UI."""
        return PocState.read(self.home).address

    def is_up(self) -> bool:
        """Whether it was brought up, and not down again."""
        return PocState.path(self.home).exists()

    def environment(self) -> dict[str, str]:
        """Variables by which other programs reach server and store; with `s3` they hold its keys.

        Raises:
            ConfigError: it was never brought up.
        """
        state = PocState.read(self.home)
        return {"PREFECT_API_URL": state.api_url, "FEDPOOL_STORE": state.store, **state.environment}

    def up(self) -> None:
        """Start what does not run: server, store, coordinator, sites; returns when all of it
        answers. Harmless when repeated.

        Raises:
            ServerError: something did not start; the message ends with what it printed.
            ConfigError: a proof of concept with other settings is up, or a program is missing.
        """
        bypass_proxies()  # the processes inherit it
        with self._locked():
            state = PocState.reconcile(self.home, database=self.database, store=self.store, s3=self.s3)
            self._services.start(state, self.names, self.coordinator_pool)

    def down(self) -> None:
        """End all processes; the results stay. Harmless when nothing runs."""
        if not self.home.exists():
            return
        with self._locked():
            self._services.stop()
            PocState.path(self.home).unlink(missing_ok=True)

    def status(self) -> list[Service]:
        """Every process: whether it runs, and whether it is healthy; empty when nothing was
        brought up.
        """
        try:
            state = PocState.read(self.home)
        except ConfigError:
            return []
        return self._services.status(state, self.coordinator_pool)

    def log(self, name: str) -> Path:
        """Where the output of a process goes.

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
