"""The state of a proof of concept: addresses, keys and settings, in `poc.json` in its folder."""

import os
import secrets
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from fedpool.deployments.server import IN_MEMORY, free_port
from fedpool.errors import ConfigError

BUCKET = "fedpool"


class PocState(BaseModel):
    """The state of a proof of concept that is up.

    Attributes:
        address: URL of the Prefect server, without `/api`.
        database: the server's database.
        store: URL of the store.
        s3: whether the store is the proof of concept's own S3 server.
        storage_options: options with which this process opens the store.
        environment: variables with which workers and other programs reach the store. With `s3`,
            these and `storage_options` hold its keys.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    database: str
    store: str
    s3: bool
    storage_options: dict[str, Any] = {}
    environment: dict[str, str] = {}

    @property
    def api_url(self) -> str:
        """URL of the Prefect server's API."""
        return f"{self.address}/api"

    @classmethod
    def path(cls, home: Path) -> Path:
        """Path of the file, which exists from `up` to `down`."""
        return home / "poc.json"

    @classmethod
    def read(cls, home: Path) -> Self:
        """The state of the proof of concept that is up.

        Raises:
            ConfigError: none is up.
        """
        try:
            return cls.model_validate_json(cls.path(home).read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"no proof of concept is up in {home}: run `fedpool poc up`") from None

    @classmethod
    def reconcile(cls, home: Path, *, database: str | None, store: str | None, s3: bool) -> Self:
        """The state of what is up, or of what to start now. None and False match any setting.

        Raises:
            ConfigError: a proof of concept with other settings is up.
        """
        try:
            state = cls.read(home)
        except ConfigError:
            state = cls._new(home, database, store, s3)
            state._write(home)
            return state
        for name, value in {"database": database, "store": store, "s3": s3}.items():
            if value not in (None, False, there := getattr(state, name)):
                raise ConfigError(
                    f"a proof of concept with {name}={there!r} is up in {home}: "
                    f"run `fedpool poc down` before you use {value!r}, or choose another home"
                )
        return state

    @classmethod
    def _new(cls, home: Path, database: str | None, store: str | None, s3: bool) -> Self:
        return cls(
            address=f"http://127.0.0.1:{free_port()}",
            database=database or IN_MEMORY,
            store=store or (f"s3://{BUCKET}" if s3 else str(home / "store")),
            s3=s3,
            **(_s3_access(free_port()) if s3 else {}),
        )

    def _write(self, home: Path) -> None:
        partial = home / f".poc.{os.getpid()}"
        partial.touch(mode=0o600)  # it holds the S3 keys
        partial.write_text(self.model_dump_json())
        partial.replace(self.path(home))


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
