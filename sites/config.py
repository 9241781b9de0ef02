"""What only a site knows: its name, its data, its devices. A TOML file, the environment
(`FEDPOOL_SITE_...`), or both.
"""

import os
import re
import tomllib
from collections.abc import Iterable
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
from fedpool.errors import ConfigError
from fedpool.fields import describe_problems, nearest
from fedpool.paths import check_new_names
from fedpool.sites.devices import missing_device
from fedpool.sites.script_process import find_program

CONFIG_VARIABLE = "FEDPOOL_SITE_CONFIG_FILE"
"""Path of the site's TOML file, for what has no option for it, e.g. `prefect worker start --type
fedpool-site`.
"""


_PREFIX = "FEDPOOL_SITE_"
_ALLOWED = "allowed_code"
_OF_KUBERNETES = re.compile(r"SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP|SCTP)\w*)?")
"""What Kubernetes tells every pod of a service named `fedpool-site`."""


class SiteConfig(BaseSettings):
    """The settings of a site; what is given beats the environment, which beats the file."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid")

    name: str = Field(description="name of the site, as recipes know it")
    pool: str | None = Field(
        default=None, description="work pool that the site's worker polls; default: the site's name"
    )
    folder: Path = Field(
        default=Path("fedpool-site"), description="the site's own folder: what it fetches, and where scripts run"
    )
    config: dict[str, JsonValue] = Field(
        default_factory=dict, description="what flare.get_config() returns here, over what the recipe says"
    )
    gpus: str | None = Field(
        default=None, description='devices that scripts may use, as CUDA_VISIBLE_DEVICES, e.g. "0,1"'
    )
    command: str = Field(
        default="python", description='what runs the client script: "python" or e.g. "torchrun --nproc-per-node 2"'
    )
    store: str | None = Field(
        default=None, description="the one store that this site works with; empty: the store that the job names"
    )
    storage_options: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="options of the store for fsspec; secrets are better off in its own variables",
        repr=False,
    )
    allowed_code: str | None = Field(
        default=None,
        description="code of jobs' filters that may run here: sha256 hashes with commas between them, any, or none; default: "
        "what FEDPOOL_ALLOWED_CODE says",
    )
    max_jobs: int | None = Field(
        default=None,
        description="how many jobs may train here at once, the others wait for their turn; empty: all of them",
        ge=1,
    )
    idle_timeout_s: float = Field(
        default=1800.0,
        description="seconds after which a job that asks for nothing is forgotten, and its script ended",
        gt=0,
    )
    max_wait_s: float = Field(
        default=86_400.0,
        description="seconds that a round which was announced is waited for; longer than the longest round",
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

    @property
    def pool_name(self) -> str:
        """The work pool of the site."""
        return self.pool or self.name

    def allow_code(self, request: Request) -> None:
        """Refuse code that came with a job, unless this site allows it.

        Raises:
            ConfigError: it does not, or its setting is not one; the message has the remedy.
        """
        setting, value = (
            (VARIABLE, os.environ.get(VARIABLE, "")) if self.allowed_code is None else (_ALLOWED, self.allowed_code)
        )
        if not allows(value, request.sha256, what=setting):
            raise ConfigError(
                f'{request}. Site {self.name} does not allow it: review it, then set {_ALLOWED} = "{request.sha256}" in the '
                f"site's configuration, or {VARIABLE}={request.sha256} in the environment of its worker, and start that again"
            )

    def check_devices(self) -> None:
        """Check that this machine has the devices that scripts are to use.

        Raises:
            ConfigError: it has not.
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
        """What is given, then the environment, then the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @classmethod
    def load(cls, file: Path | None = None, **given: Any) -> "SiteConfig":
        """Read the settings of a site.

        Args:
            file: TOML, with the fields as keys; None: the one that `FEDPOOL_SITE_CONFIG_FILE`
                names, if it does.
            given: fields that beat environment and file; None counts as not given.

        Raises:
            ConfigError: the file cannot be read, or a field does not fit; with its name, its value
                and the remedy. A variable of the environment has no field.
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
            problems = "; ".join(describe_problems(cls, error, given))
            raise ConfigError(f"the site's configuration is invalid: {problems}") from None
        except (OSError, SettingsError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"the site's configuration cannot be read: {error}") from None
        return settings


def check_variables(names: Iterable[str]) -> None:
    """Check that every variable of a site's settings is one.

    Args:
        names: of variables; those without the prefix are others'.

    Raises:
        ConfigError: one is not, and would be ignored; says which one may be meant.
    """
    known = [CONFIG_VARIABLE, *(f"{_PREFIX}{field.upper()}" for field in SiteConfig.model_fields)]
    for name in sorted(names):
        upper = name.upper()  # in any case, as the settings are read
        if upper in known or not upper.startswith(_PREFIX) or _OF_KUBERNETES.fullmatch(upper.removeprefix(_PREFIX)):
            continue
        meant = nearest(name.upper(), known)
        hint = f"did you mean {meant}?" if meant else f"there are {', '.join(known)}"
        raise ConfigError(f"the environment sets {name}, which is not a setting of a site: {hint}")
