"""A real HTTP proxy for tests (proxy.py): it resolves every host name to this machine, and records
the requested hosts.

Run as a module, it starts the proxy.
"""

import os
import sys
from pathlib import Path

from proxy import main
from proxy.http.parser import HttpParser
from proxy.http.proxy import HttpProxyBasePlugin

from tests.services import Process, _free_port


class Proxy:
    """The proxy, serving on a loopback port until `close()`.

    Args:
        folder: the test's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._asked = folder / "proxy-asked"
        self._asked.touch()
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        port_file = folder / "proxy-port"
        self._process = Process(
            [
                sys.executable,
                "-m",
                "tests.http_proxy",
                "--hostname",
                "127.0.0.1",
                "--port",
                str(port),
                "--port-file",
                port_file,
            ],
            output=folder / "proxy.log",
            environment={**os.environ, "PROXY_ASKED": str(self._asked), "PYTHONPATH": str(Path(__file__).parents[1])},
            end_by="TERM",
        )
        self._process.wait_until(port_file.exists)

    @property
    def asked(self) -> list[str]:
        """The requests so far, as "METHOD HOST:PORT", one for each connection."""
        return self._asked.read_text().splitlines()

    def close(self) -> None:
        """Stop the proxy."""
        self._process.end()


class ToThisMachine(HttpProxyBasePlugin):
    """Records the requests, and resolves every host name to this machine."""

    def resolve_dns(self, host: str, port: int) -> tuple[str | None, None]:
        """The address of a host."""
        return "127.0.0.1", None

    def before_upstream_connection(self, request: HttpParser) -> HttpParser:
        """Record a client's request."""
        assert request.method is not None and request.host is not None
        with open(os.environ["PROXY_ASKED"], "a") as file:
            file.write(f"{request.method.decode()} {request.host.decode()}:{request.port}\n")
        return request

    def handle_client_request(self, request: HttpParser) -> HttpParser:
        """Pass the request on unchanged."""
        return request


if __name__ == "__main__":
    main(plugins=["tests.http_proxy.ToThisMachine"], num_workers=1, num_acceptors=1, threadless=False)
