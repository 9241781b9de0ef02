"""Keep the loopback off proxies.

httpx, websockets and botocore take their proxies from the environment, and use them even for a
server on this machine, which no proxy can reach. Prefect creates its clients in many places and
doesn't let callers configure them, so the environment has to exclude the loopback.
"""

import ipaddress
import os
from urllib.request import getproxies_environment

_HOSTS = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


def bypass_proxies(*hosts: str | None) -> None:
    """Make this process and its children reach the loopback directly, with `NO_PROXY`. Idempotent.

    Args:
        hosts: more hosts; those that are loopback addresses, such as 127.0.1.1, are added.
    """
    proxies = getproxies_environment()
    known = [host.strip() for host in proxies.pop("no", "").split(",") if host.strip()]
    if not proxies or "*" in known:
        return
    wanted = [*_HOSTS, *(host for host in hosts if host is not None and _is_loopback(host))]
    if missing := [host for host in dict.fromkeys(wanted) if host not in known]:
        # If both variables are set, the lower-case one counts; some programs read only one of them.
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*known, *missing])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
