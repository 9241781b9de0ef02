"""A real HTTP proxy for tests, the program proxy.py: it reaches every host name on this machine,
and notes whom it was asked for.

Run as a module, it is that program.
"""

import os
import sys
from pathlib import Path

from proxy import main
from proxy.http.parser import HttpParser
from proxy.http.proxy import HttpProxyBasePlugin

from tests.services import _free_port, _Process


class Proxy:
    """The program, serving on a port of the loopback until `close()`.

    Args:
        folder: the test's own.
    """

    def __init__(self, folder: Path) -> None:
        self._asked = folder / "proxy-asked"
        self._asked.touch()
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        port_file = folder / "proxy-port"
        self._process = _Process(
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
        """What it was asked for so far: "METHOD HOST:PORT", one for each connection."""
        return self._asked.read_text().splitlines()

    def close(self) -> None:
        """End it."""
        self._process.end()


class ToThisMachine(HttpProxyBasePlugin):
    """Notes what is asked for, and resolves every host name to this machine."""

    def resolve_dns(self, host: str, port: int) -> tuple[str | None, None]:
        """Where a host is."""
        return "127.0.0.1", None

    def before_upstream_connection(self, request: HttpParser) -> HttpParser:
        """Called with what comes from a client."""
        assert request.method is not None and request.host is not None
        with open(os.environ["PROXY_ASKED"], "a") as file:
            file.write(f"{request.method.decode()} {request.host.decode()}:{request.port}\n")
        return request

    def handle_client_request(self, request: HttpParser) -> HttpParser:
        """Passed on as it is."""
        return request


if __name__ == "__main__":
    main(plugins=["tests.http_proxy.ToThisMachine"], num_workers=1, num_acceptors=1, threadless=False)
