"""The state of a proof of concept: addresses, keys and settings, in `poc.json` in its folder.

Only the owner can read the folder and the file, because it has the server's password.
"""

import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedpool.deployments.access import Access
from fedpool.deployments.server import IN_MEMORY, free_port
from fedpool.errors import ConfigError

BUCKET = "fedpool"


class PocState(BaseModel):
    """The state of a proof of concept that is up.

    Attributes:
        address: URL of the Prefect server, without `/api`.
        password: its password.
        database: its database.
        store: URL of the store.
        s3: whether the store is the proof of concept's own S3 server.
        storage_options: options with which this process opens the store.
        environment: variables with which workers and other programs reach the store. With `s3`,
            these and `storage_options` hold its keys.
    """

    # What a message shows of a value is up to pydantic, and here it could be a secret.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    address: str
    password: str = Field(repr=False)
    database: str = Field(repr=False)
    store: str
    s3: bool
    storage_options: dict[str, Any] = Field(default={}, repr=False)
    environment: dict[str, str] = Field(default={}, repr=False)

    @property
    def access(self) -> Access:
        """Access to the Prefect server."""
        return Access(self.address, self.password)

    @classmethod
    def path(cls, home: Path) -> Path:
        """Path of the file, which exists from `up` to `down`."""
        return home / "poc.json"

    @classmethod
    def read(cls, home: Path) -> Self:
        """The state of the proof of concept that is up.

        Raises:
            ConfigError: none is up, or another version of fedpool started it.
        """
        try:
            return cls.model_validate_json(cls.path(home).read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"no proof of concept is up in {home}: run `fedpool poc up`") from None
        except ValidationError:
            raise ConfigError(
                f"another version of fedpool started the proof of concept in {home}: run `fedpool poc down`, "
                "then `fedpool poc up`"
            ) from None

    @classmethod
    def reconcile(cls, home: Path, *, database: str | None, store: str | None, s3: bool) -> Self:
        """The state of what is up, or of what to start now. None and False match any setting.

        Raises:
            ConfigError: a proof of concept with other settings, or of another version, is up.
        """
        if not cls.path(home).exists():
            state = cls._new(home, database, store, s3)
            state._write(home)
            return state
        state = cls.read(home)
        for name, value in {"database": database, "store": store, "s3": s3}.items():
            if value not in (None, False, there := getattr(state, name)):
                raise ConfigError(
                    f"a proof of concept with {name}={_shown(there)} is up in {home}: "
                    f"run `fedpool poc down` before you use {_shown(value)}, or choose another home"
                )
        return state

    @classmethod
    def _new(cls, home: Path, database: str | None, store: str | None, s3: bool) -> Self:
        access = Access.new(free_port())
        return cls(
            address=access.address,
            password=access.password,
            database=database or IN_MEMORY,
            store=store or (f"s3://{BUCKET}" if s3 else str(home / "store")),
            s3=s3,
            **(_s3_access(free_port()) if s3 else {}),
        )

    def _write(self, home: Path) -> None:
        partial = home / f".poc.{os.getpid()}"
        partial.touch(mode=0o600)  # it holds the password and the S3 keys
        partial.write_text(self.model_dump_json())
        partial.replace(self.path(home))


def close_to_others(home: Path) -> None:
    """Close the folder to other users: it holds the password, the sites' folders and the store.

    Raises:
        ConfigError: this user may not.
    """
    if stat.S_IMODE(home.stat().st_mode) & 0o077:
        try:
            home.chmod(0o700)
        except PermissionError:
            raise ConfigError(
                f"other users may look into {home}, and you may not change that: choose another home"
            ) from None


def _shown(setting: object) -> str:
    """A setting for a message: the password in the database's URL is left out."""
    return re.sub(r"(://[^:/]*):[^/]*@", r"\1:***@", repr(setting))


def _s3_access(port: int) -> dict[str, Any]:
    """Access to our own S3 server: options for this process, variables for the workers."""
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    endpoint = f"http://127.0.0.1:{port}"
    return {
        "storage_options": {"key": key, "secret": secret, "endpoint_url": endpoint},
        "environment": {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    }
