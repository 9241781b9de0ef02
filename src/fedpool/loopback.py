"""The loopback never goes through a proxy.

httpx, websockets and botocore take their proxies from the environment, and use them even for a
server on this very machine, which no proxy can reach. Prefect makes its clients in many places and
lets nobody configure them, so the environment says it.
"""

import ipaddress
import os
from urllib.request import getproxies_environment

_HOSTS = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


def bypass_proxies(*hosts: str | None) -> None:
    """Have this process, and those that it starts, reach the loopback directly, by `NO_PROXY`.
    Harmless when repeated.

    Args:
        hosts: further ones, of which those that are of the loopback count, such as 127.0.1.1.
    """
    proxies = getproxies_environment()
    known = [host.strip() for host in proxies.pop("no", "").split(",") if host.strip()]
    if not proxies or "*" in known:
        return
    wanted = [*_HOSTS, *(host for host in hosts if host is not None and _is_loopback(host))]
    if missing := [host for host in dict.fromkeys(wanted) if host not in known]:
        # Where both are set, the one in small letters counts; some programs read only one of them.
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*known, *missing])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
