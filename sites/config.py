"""A site's own settings, such as its name, data and devices, from TOML or `FEDPOOL_SITE_...`."""

import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from fedpool.allowed_code import VARIABLE, Request, allows
from fedpool.backend import normal_url
from fedpool.errors import ConfigError
from fedpool.fields import describe_problems, nearest
from fedpool.paths import check_new_names
from fedpool.sites.devices import missing_device
from fedpool.sites.sandbox import Sandbox
from fedpool.sites.script_environment import check_pattern
from fedpool.sites.script_process import find_program
from fedpool.store import Store

CONFIG_VARIABLE = "FEDPOOL_SITE_CONFIG_FILE"
"""Path of the site's TOML file, for commands without the option, such as `prefect worker start`."""


_PREFIX = "FEDPOOL_SITE_"
_ALLOWED = "allowed_code"
_EXAMPLES = {"name": '"hospital-a"', "store": '"s3://fl-jobs"'}
"""The settings that have no default, and an example for each."""
_OF_KUBERNETES = re.compile(r"SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP|SCTP)\w*)?")
"""Variables that Kubernetes sets in every pod for a service named `fedpool-site`."""


class SiteConfig(BaseSettings):
    """A site's settings. Arguments override the environment, which overrides the file."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid")

    name: str = Field(description="name of the site, as used in recipes")
    pool: str | None = Field(
        default=None, description="work pool that the site's worker polls; default: the site's name"
    )
    folder: Path = Field(
        default=Path("fedpool-site"), description="the site's own folder, for its downloads and for running scripts"
    )
    config: dict[str, JsonValue] = Field(
        default_factory=dict, description="values that flare.get_config() returns here; they override the recipe's"
    )
    gpus: str | None = Field(
        default=None, description='devices that scripts may use, in the format of CUDA_VISIBLE_DEVICES, e.g. "0,1"'
    )
    command: str = Field(
        default="python",
        description='command that runs the client script: "python" or e.g. "torchrun --nproc-per-node 2"',
    )
    script_environment: tuple[str, ...] = Field(
        default=(),
        description='variables of the worker that scripts get in addition to those that they need, e.g. "HF_HOME", "MY_*"',
    )
    sandbox: Sandbox = Field(default=Sandbox(), description="what client scripts may reach here")
    store: str = Field(
        description="URL of the only store that this site uses, such as s3://fl-jobs; a run that names another is refused",
        min_length=1,
    )
    storage_options: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="fsspec options of the store; keep secrets in the store's own environment variables instead",
        repr=False,
    )
    allowed_code: str | None = Field(
        default=None,
        description="filter code of jobs that may run here: comma-separated sha256 hashes, any, or none; default: "
        "the value of FEDPOOL_ALLOWED_CODE",
    )
    max_jobs: int | None = Field(
        default=None,
        description="number of jobs that may train here at once; the others wait for their turn; default: no limit",
        ge=1,
    )
    idle_timeout_s: float = Field(
        default=1800.0,
        description="seconds without an assignment after which a job's script is ended",
        gt=0,
    )
    max_wait_s: float = Field(
        default=86_400.0,
        description="seconds to wait for an announced round to begin; more than the longest round takes",
        gt=0,
    )

    @field_validator("name")
    @classmethod
    def _name_fits(cls, value: str) -> str:
        check_new_names("site", [value])
        return value

    @field_validator("command")
    @classmethod
    def _command_has_a_program(cls, value: str) -> str:
        find_program(value)
        return value

    @field_validator("script_environment")
    @classmethod
    def _has_no_secrets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            check_pattern(pattern)
        return value

    @property
    def pool_name(self) -> str:
        """The site's work pool."""
        return self.pool or self.name

    def allow_code(self, request: Request) -> None:
        """Refuse code that came with a job, unless this site allows it.

        Raises:
            ConfigError: the site does not allow the code, or its setting is invalid. The message
                gives the remedy.
        """
        setting, value = (
            (VARIABLE, os.environ.get(VARIABLE, "")) if self.allowed_code is None else (_ALLOWED, self.allowed_code)
        )
        if not allows(value, request.sha256, what=setting):
            raise ConfigError(
                f'{request}. Site {self.name} does not allow it: review it, then set {_ALLOWED} = "{request.sha256}" in the '
                f"site's configuration, or {VARIABLE}={request.sha256} in the environment of its worker, and restart the worker"
            )

    def check_store(self, named: str) -> None:
        """Refuse a run that names another store than this site's. Opens neither of them.

        Raises:
            ConfigError: it names another; the message has both, and the remedy.
        """
        if normal_url(named) != normal_url(self.store):
            raise ConfigError(
                f"the run names the store {named!r}, but {self.name} takes jobs only from {normal_url(self.store)!r}: correct "
                "the store of the environment that submits the job, or `store` in the site's settings"
            )

    def open_store(self) -> Store:
        """The site's store.

        Raises:
            ConfigError: it cannot be opened; see `Store`.
        """
        return Store(self.store, **self.storage_options)

    def check_devices(self) -> None:
        """Check that this machine has the devices that scripts may use.

        Raises:
            ConfigError: a device is missing.
        """
        if self.gpus is not None and (wrong := missing_device(self.gpus)) is not None:
            raise ConfigError(f"site {self.name}: {wrong}")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments first, then the environment, then the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @classmethod
    def load(cls, file: Path | None = None, **given: Any) -> "SiteConfig":
        """Read the settings of a site.

        Args:
            file: a TOML file whose keys are the fields; None: the file named by
                `FEDPOOL_SITE_CONFIG_FILE`, if set.
            given: fields that override the environment and the file; None counts as not given.

        Raises:
            ConfigError: the file cannot be read, a field is invalid (the message gives its name,
                its value and the remedy), or a variable in the environment matches no field.
        """
        check_variables(os.environ)
        if file is None and (named := os.environ.get(CONFIG_VARIABLE)):
            file = Path(named)
        if file is not None and not file.is_file():
            raise ConfigError(f"site configuration {str(file)!r} is not a file (looked in {Path.cwd()})")

        class FromFile(cls):  # type: ignore[misc, valid-type]
            model_config = SettingsConfigDict(toml_file=file)

        try:
            settings: SiteConfig = FromFile(**{key: value for key, value in given.items() if value is not None})
        except ValidationError as error:
            problems = "; ".join([*describe_problems(cls, error, given), *_remedies(error)])
            raise ConfigError(f"the site's configuration is invalid: {problems}") from None
        except (OSError, SettingsError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"the site's configuration cannot be read: {error}") from None
        return settings


def _remedies(error: ValidationError) -> Iterator[str]:
    """What to do about each setting that was not given."""
    for entry in error.errors(include_url=False):
        if entry["type"] == "missing":
            name = str(entry["loc"][0])
            yield (
                f"give {name} in the site's file, such as {name} = {_EXAMPLES[name]}, with the option --{name}, or as "
                f"{_PREFIX}{name.upper()}"
            )


def check_variables(names: Iterable[str]) -> None:
    """Check that every variable with the prefix `FEDPOOL_SITE_` is a setting of a site.

    Args:
        names: names of variables; those without the prefix are ignored.

    Raises:
        ConfigError: a variable is not a setting, so it would be ignored. The message suggests the
            intended name.
    """
    known = [CONFIG_VARIABLE, *(f"{_PREFIX}{field.upper()}" for field in SiteConfig.model_fields)]
    for name in sorted(names):
        upper = name.upper()  # settings are read case-insensitively
        if upper in known or not upper.startswith(_PREFIX) or _OF_KUBERNETES.fullmatch(upper.removeprefix(_PREFIX)):
            continue
        meant = nearest(name.upper(), known)
        hint = f"did you mean {meant}?" if meant else f"the settings are {', '.join(known)}"
        raise ConfigError(f"the environment sets {name}, which is not a setting of a site: {hint}")
