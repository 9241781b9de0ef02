"""The Prefect API of a simulation: the one that is configured, else a private server of its own."""

import os
import sys
from contextlib import ExitStack
from importlib import import_module
from typing import Any

from rich.console import Console

from fedpool.deployments.server import private_server
from fedpool.sites.local import LocalSites
from fedpool.tasks.prefect_internals import import_for_first_run, surrounding_api


def find_api(stack: ExitStack, console: Console, sites: LocalSites) -> dict[Any, object]:
    """Settings by which Prefect finds the API that is configured, else a private server that lives
    as long as the stack does.

    Has the sites import what they need meanwhile.
    """
    # A server takes seconds to start, importing Prefect one or two more: do both at once. Only
    # Prefect can tell whether a profile names an API; then the server goes again.
    server = None
    if "prefect" not in sys.modules and "PREFECT_API_URL" not in os.environ:
        server = stack.enter_context(private_server())
    # The server has the most to import, and all wait for it: on two processors a third process
    # would only delay it.
    sites_wait = server is not None and (os.cpu_count() or 1) < 3
    if not sites_wait:
        sites.preload()

    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_CLIENT_CSRF_SUPPORT_ENABLED,
        PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED,
    )

    import_module("fedpool.flows.job")
    if sites_wait:
        sites.preload()
    configured: str | None = PREFECT_API_URL.value()
    if configured is not None:
        if server is not None:
            server.close()
        from fedpool.deployments.api import check_server

        check_server("start it, or unset PREFECT_API_URL to have a private server")
        return {PREFECT_API_URL: configured}
    if (around := surrounding_api()) is not None:
        return {PREFECT_API_URL: around}
    server = server or stack.enter_context(private_server())
    import_for_first_run()
    server.wait()
    console.print(f"Prefect UI while this runs: {server.address}", highlight=False)
    # A server of ours is of our version, and asks for no token: there is nothing to ask it first.
    ask_first = (PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED)
    return {PREFECT_API_URL: server.api_url, **dict.fromkeys(ask_first, False)}
