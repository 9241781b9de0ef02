"""The configured Prefect server: whether it answers, and a client for it.

Prefect retries requests to an unreachable server many times before it raises its own error. So the
server is checked once, before anything depends on it.
"""

import asyncio
import base64
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx

from fedpool.errors import ConfigError, ServerError
from fedpool.loopback import bypass_proxies
from fedpool.tasks.prefect_internals import profile_name

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

_CONNECT_S = 5.0
_ANSWER_S = 20.0
"""A busy server may take seconds to answer; a missing one does not accept the connection."""


def check_server(remedy: str | None = None) -> str:
    """Check that the configured Prefect server answers; returns the URL of its API.

    Args:
        remedy: what to do if it does not; default: start it, or correct the setting.

    Raises:
        ServerError: it does not answer, or refuses access. The message gives its URL and the
            remedy.
        ConfigError: no server is configured, or the setting is not a URL.
    """
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_API_URL, get_current_settings

    url: str | None = PREFECT_API_URL.value()
    if not url:
        raise ConfigError(
            "no Prefect server is configured: set PREFECT_API_URL to the URL of its API, such as http://127.0.0.1:4200/api"
        )
    if not _is_url(url):
        raise ConfigError(
            f"PREFECT_API_URL={url!r} is not a URL: {_setting()} to one such as http://127.0.0.1:4200/api"
        )
    settings = get_current_settings()
    headers = dict(settings.client.custom_headers)
    if password := PREFECT_API_AUTH_STRING.value():
        headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
    elif key := PREFECT_API_KEY.value():
        headers["Authorization"] = f"Bearer {key}"
    try:
        bypass_proxies(httpx.URL(url).host)
        timeout = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S)
        certificates = _certificates(settings.api.tls_insecure_skip_verify, settings.api.ssl_cert_file)
        with httpx.Client(timeout=timeout, headers=headers, verify=certificates, follow_redirects=True) as client:
            answer = client.get(f"{url.rstrip('/')}/hello")
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise _no_answer(url, _cause(error), remedy) from None  # httpx's tracebacks would bury the message
    if answer.status_code in (401, 403):
        raise ServerError(
            f"the Prefect server at {url} refused access ({answer.status_code} {answer.reason_phrase}): check "
            "PREFECT_API_AUTH_STRING, or auth_string of the environment"
        )
    if answer.status_code >= 500:
        raise _no_answer(url, f"HTTP {answer.status_code} {answer.reason_phrase}", remedy)
    if answer.status_code >= 400 or not answer.headers.get("content-type", "").startswith("application/json"):
        other = "" if url.rstrip("/").endswith("/api") else f", so try {url.rstrip('/')}/api"
        raise ServerError(
            f"there is no Prefect API at {url} (HTTP {answer.status_code} {answer.reason_phrase}): "
            f"such a URL ends in /api{other}"
        )
    return url


@asynccontextmanager
async def open_client(remedy: str | None = None) -> AsyncIterator["PrefectClient"]:
    """A client for the configured Prefect server, after `check_server`."""
    from prefect.client.orchestration import get_client

    await asyncio.to_thread(check_server, remedy)
    async with get_client() as client:
        yield client


def _is_url(url: str) -> bool:
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parts.scheme in ("http", "https") and bool(parts.host)


def _no_answer(url: str, cause: str, remedy: str | None) -> ServerError:
    return ServerError(
        f"the Prefect server at {url} does not answer ({cause}): {remedy or f'start it, or {_setting()}'}"
    )


def _setting() -> str:
    """How to change the configured server."""
    if "PREFECT_API_URL" in os.environ:
        return "correct PREFECT_API_URL"
    return f"correct PREFECT_API_URL of the Prefect profile {profile_name()!r}"


def _certificates(skip: bool, file: str | None) -> ssl.SSLContext:
    if skip:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    import certifi  # as Prefect does

    return ssl.create_default_context(cafile=file or certifi.where())


def _cause(error: Exception) -> str:
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection within {_CONNECT_S:g} s"
    if isinstance(error, httpx.TimeoutException):
        return f"no answer within {_ANSWER_S:g} s"
    return str(error) or type(error).__name__
