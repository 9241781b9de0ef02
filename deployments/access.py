"""Access to a Prefect server that fedpool starts on this machine: its address and its password.

Without a password, every user of the machine could use the server, and so could every web page that
a browser on it has open. The password is random and travels only in the environment of processes
that need it, in private files, and in a link that signs a browser in. Command lines and logs never
have it.
"""

import base64
import secrets
from dataclasses import dataclass, field
from typing import Any, Self

SIGN_IN = "/sign-in"
"""Path of the page that signs a browser in: see `local_app`."""

_USER = "fedpool"
"""Prefect compares only the whole, but programs such as curl expect a name before the password."""


@dataclass(frozen=True, slots=True)
class Access:
    """How processes of this machine reach a server.

    Attributes:
        address: URL of the server, without `/api`.
        password: what Prefect calls an auth string, `NAME:SECRET`.
    """

    address: str
    password: str = field(repr=False)

    @classmethod
    def new(cls, port: int) -> Self:
        """Access by a new password to a server on this machine's loopback."""
        return cls(f"http://127.0.0.1:{port}", f"{_USER}:{secrets.token_urlsafe(24)}")

    @property
    def port(self) -> int:
        """The server's port."""
        return int(self.address.rsplit(":", 1)[1])

    @property
    def api_url(self) -> str:
        """URL of the server's API."""
        return f"{self.address}/api"

    @property
    def link(self) -> str:
        """Link that opens the UI, signed in. A browser sends no server the part after `#`."""
        return f"{self.address}{SIGN_IN}#{self.password}"

    @property
    def headers(self) -> dict[str, str]:
        """The headers that a request without Prefect's client needs."""
        return {"Authorization": f"Basic {base64.b64encode(self.password.encode()).decode()}"}

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which Prefect in other processes reaches the server."""
        return {"PREFECT_API_URL": self.api_url, "PREFECT_API_AUTH_STRING": self.password}

    @property
    def server_environment(self) -> dict[str, str]:
        """Variables with which the server asks for the password, and allows no other page to read
        its answers.
        """
        return {
            "PREFECT_SERVER_API_AUTH_STRING": self.password,
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": self.address,
        }

    def settings(self) -> dict[Any, Any]:
        """Prefect settings with which this process reaches the server.

        They replace the user's settings for another server, also a header that would otherwise
        replace our password.
        """
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_CLIENT_CUSTOM_HEADERS

        theirs = [name for name in PREFECT_CLIENT_CUSTOM_HEADERS.value() if name.lower() == "authorization"]
        return {
            PREFECT_API_URL: self.api_url,
            PREFECT_API_AUTH_STRING: self.password,
            PREFECT_CLIENT_CUSTOM_HEADERS: dict.fromkeys(theirs, self.headers["Authorization"]),
        }
