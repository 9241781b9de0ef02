"""The private Prefect server."""

from pathlib import Path

import httpx
import pytest

from fedpool.deployments import server as server_module
from fedpool.deployments.access import Access
from fedpool.deployments.server import private_server
from fedpool.errors import ServerError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedpool"


def answers(access: Access) -> bool:
    """Whether the server can create and read a flow."""
    with httpx.Client(base_url=access.api_url, headers=access.headers, trust_env=False, timeout=60) as client:
        created = client.post("/flows/", json={"name": "f"})
        return created.status_code == 201 and client.get("/flows/name/f").status_code == 200


@pytest.mark.slow
def test_the_tables_are_kept_for_the_next_server_and_a_damaged_copy_is_made_anew(own_cache: Path) -> None:
    with private_server() as server:
        server.wait()
        assert answers(server.access)
    (kept,) = own_cache.glob("prefect-*.sqlite")
    with private_server() as server:
        server.wait()
        assert answers(server.access)
    for damage in (b"not a database" * 1000, b""):
        kept.write_bytes(damage)
        with private_server() as server:
            server.wait()
            assert answers(server.access)


@pytest.mark.slow
def test_the_ui_is_served_and_calls_its_own_server() -> None:
    with private_server() as server:
        server.wait()
        with httpx.Client(trust_env=False, timeout=60) as client:
            assert "<html" in client.get(server.access.address).text.lower()
            assert client.get(f"{server.access.address}/ui-settings").json()["api_url"] == "/api"


def test_a_server_that_cannot_start_says_why() -> None:
    with private_server() as server:
        server._process.kill()
        with pytest.raises(ServerError, match="ended while starting"):
            server.wait()


def test_a_server_that_does_not_answer_in_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STARTUP_TIMEOUT_S", 0.0)
    with private_server() as server, pytest.raises(ServerError, match="did not answer within 0 s"):
        server.wait()
