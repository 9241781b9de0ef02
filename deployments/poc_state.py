"""What is up in a proof of concept's folder: addresses, keys and settings, in `poc.json` there."""

import os
import secrets
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from fedpool.deployments.server import IN_MEMORY, free_port
from fedpool.errors import ConfigError

BUCKET = "fedpool"


class PocState(BaseModel):
    """What was brought up, for whoever comes later.

    Attributes:
        address: URL of the Prefect server, without `/api`.
        database: the server's.
        store: URL of the store.
        s3: whether the store is an S3 server of the proof of concept's own.
        storage_options: how the store is opened from here.
        environment: variables by which workers and other programs reach the store; with `s3` both
            hold its keys.
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
        """The file; it is there from `up` to `down`."""
        return home / "poc.json"

    @classmethod
    def read(cls, home: Path) -> Self:
        """What is up.

        Raises:
            ConfigError: nothing is.
        """
        try:
            return cls.model_validate_json(cls.path(home).read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"no proof of concept is up in {home}: run `fedpool poc up`") from None

    @classmethod
    def reconcile(cls, home: Path, *, database: str | None, store: str | None, s3: bool) -> Self:
        """What is up, or what to bring up now; settings that are None or False agree with
        everything.

        Raises:
            ConfigError: what is up has other settings.
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
                    f"run `fedpool poc down` before you ask for {value!r}, or give another home"
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
    """How an S3 server of our own is reached: by options from here, by variables from the
    workers.
    """
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
