"""Checks before a job is submitted to sites behind work pools. One error lists all problems."""

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import httpx

from fedpool.errors import ConfigError, ServerError, StoreError, StoreRefused
from fedpool.store import Store

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient


def probe(store: Store) -> None:
    """Write an object to the store and remove it again.

    Raises:
        StoreError: the store is not writable; the message says where and why.
    """
    path = f".fedpool-probe-{secrets.token_hex(6)}"
    try:
        store.write_bytes(path, b"probe")
        store.remove(path)
    except StoreRefused:
        raise
    except StoreError as error:
        raise StoreError(
            f"{error}: check the address of the store, {store.url}, and that its credentials are in the environment"
        ) from None


async def check(client: "PrefectClient", sites: Sequence[str], coordinator_pool: str) -> None:
    """Check the server, the work pools, their workers and the sites.

    Raises:
        ServerError: the server does not answer.
        ConfigError: a pool, an online worker or a site is missing, a pool is paused, or a site's
            protocol is too old. One message lists all problems.
    """
    from prefect.exceptions import PrefectHTTPStatusError

    from fedpool.tasks.reach import COORDINATOR_TYPE, pool_problem, read_pools, site_problems, wrong_type

    try:
        start = f"fedpool coordinator start --pool {coordinator_pool}"
        pool = (await read_pools(client, [coordinator_pool])).get(coordinator_pool)
        if pool is not None and pool.kind != COORDINATOR_TYPE:
            problem: str | None = wrong_type(coordinator_pool, pool.kind)
        else:
            problem = pool_problem(pool, coordinator_pool, start)
        problems = [problem] if problem else []
        for found in (await site_problems(client, sites)).values():
            problems += found
    except PrefectHTTPStatusError as error:
        raise ServerError(f"the Prefect server at {client.api_url} refused the request: {error}") from error
    except (httpx.HTTPError, RuntimeError) as error:
        raise ServerError(f"the Prefect server at {client.api_url} does not answer: {error}") from error
    if problems:
        raise ConfigError("\n".join(problems))
