"""The connection between a client script and its session host: JSON objects over
`multiprocessing.connection`, never pickles.

Script to host: `hello`, `next`, `update`, `log`, `logs`, `bye`. Host to script: `welcome`,
`assignment`, `end`. Tensors are in safetensors files; the assignment has their paths.
"""

import json
import os
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from typing import Any

LINK_PROTOCOL = 2
ADDRESS_VARIABLE = "FEDPOOL_SESSION_ADDRESS"
KEY_VARIABLE = "FEDPOOL_SESSION_KEY"
_MAX_BYTES = 256 << 20
"""Limit on a message."""


@dataclass(frozen=True, slots=True)
class Link:
    """One end of the connection."""

    connection: "Connection[Any, Any]"

    def put(self, kind: str, **fields: Any) -> None:
        """Send a message; raises `OSError` if the other end is gone."""
        self.connection.send_bytes(json.dumps({"kind": kind, **fields}).encode())

    def get(self) -> dict[str, Any]:
        """The next message; raises `EOFError` or `OSError` if the other end is gone."""
        message: dict[str, Any] = json.loads(self.connection.recv_bytes(_MAX_BYTES))
        return message

    def close(self) -> None:
        """Close this end; the other end gets an `EOFError`."""
        self.connection.close()


def connect() -> Link | None:
    """The link to the host that started this process, or None if the script runs standalone."""
    address = os.environ.get(ADDRESS_VARIABLE)
    if address is None:
        return None
    return Link(Client(address, authkey=bytes.fromhex(os.environ[KEY_VARIABLE])))
