"""The Prefect API of a simulation: the configured one, or else a private server."""

import os
import sys
from contextlib import ExitStack
from importlib import import_module
from typing import Any

from rich.console import Console

from fedpool.deployments.server import private_server
from fedpool.deployments.terminal import ui_address
from fedpool.sites.local import LocalSites
from fedpool.tasks.prefect_internals import import_for_first_run, surrounding_api


def find_api(stack: ExitStack, console: Console, sites: LocalSites) -> dict[Any, object]:
    """Prefect settings for the configured API, or else for a private server in `stack`.

    Meanwhile, the sites begin to import what they need.
    """
    # A server takes seconds to start, and importing Prefect one or two more, so do both at once.
    # Only Prefect knows whether a profile configures an API; if so, the server is closed again.
    server = None
    if "prefect" not in sys.modules and "PREFECT_API_URL" not in os.environ:
        server = stack.enter_context(private_server())
    # The server has the most to import, and everything waits for it: on two processors a third
    # process would only delay it.
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

        check_server("start it, or unset PREFECT_API_URL to use a private server")
        return {PREFECT_API_URL: configured}
    if (around := surrounding_api()) is not None:
        return {PREFECT_API_URL: around}
    server = server or stack.enter_context(private_server())
    import_for_first_run()
    server.wait()
    shown = ui_address(console, server.access, f"the link in {server.link_file} signs you in")
    console.print(f"Prefect UI during the run: {shown}", highlight=False, markup=False, soft_wrap=True)
    # Our own server has our version and needs no token, so the client has nothing to ask first.
    ask_first = (PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED)
    return {**server.access.settings(), **dict.fromkeys(ask_first, False)}
