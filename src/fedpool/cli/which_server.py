"""Which Prefect server a command uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpool.deployments.poc import PocEnv
from fedpool.errors import ConfigError


@contextmanager
def meant_server(home: Path) -> Iterator[None]:
    """Inside a `with` block, use the configured server, else that of the running proof of concept.

    Args:
        home: folder of the proof of concept.

    Raises:
        ConfigError: there is neither.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        yield
        return
    proof = PocEnv(home=home)
    if not proof.is_up():
        raise ConfigError(
            f"no Prefect server is configured: set PREFECT_API_URL, or start a proof of concept in {proof.home}: fedpool poc up"
        )
    with temporary_settings(proof.settings()):
        yield
