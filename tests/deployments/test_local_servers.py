"""Who may use the servers that fedpool starts on this machine: neither other people's web pages nor
other users.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from fedpool import PocEnv
from fedpool.deployments.access import SIGN_IN, Access
from fedpool.deployments.server import private_server
from tests.poc import brought_up

pytestmark = pytest.mark.timeout(600)

FOREIGN = "https://page.example"
SOCKETS = (
    "events/in",
    "events/out",
    "logs/out",
    "task_runs/subscriptions/scheduled",
    "work_pools/site-1/workers/connect",
)


@pytest.fixture(
    scope="module",
    params=["simulation", pytest.param("proof of concept", marks=pytest.mark.slow)],
)
def access(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    """Access to a simulation's private server, and to a proof of concept's."""
    if request.param == "simulation":
        with private_server() as server:
            server.wait()
            yield server.access
    else:
        with brought_up(PocEnv(clients=("site-1",), home=tmp_path_factory.mktemp("poc"), progress=False)) as env:
            yield env.access


@pytest.fixture
def client(access: Access) -> Iterator[httpx.Client]:
    """A client that knows the address, and no password."""
    with httpx.Client(base_url=access.address, trust_env=False, timeout=60) as client:
        yield client


def test_a_page_of_another_origin_may_not_ask_first(client: httpx.Client) -> None:
    asked = {
        "Origin": FOREIGN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    answer = client.options("/api/flow_runs/filter", headers=asked)
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("kind", [{"Content-Type": "text/plain"}, {}])
def test_a_simple_request_of_a_foreign_page_does_nothing_and_its_answer_is_not_for_the_page(
    kind: dict[str, str], client: httpx.Client
) -> None:
    # A browser sends such requests without asking first. Prefect reads a body without a type as
    # JSON.
    answer = client.post("/api/flows/", content=json.dumps({"name": "foreign"}), headers={"Origin": FOREIGN, **kind})
    assert answer.status_code == 401
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("password", [None, "", "fedpool:", "fedpool:wrong"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/hello"),
        ("GET", "/api/admin/settings"),
        ("GET", "/api/docs"),
        ("POST", "/api/flow_runs/filter"),
        ("POST", "/api/work_pools/filter"),
        ("POST", "/api/events"),
        ("DELETE", "/api/work_pools/site-1"),
    ],
)
def test_without_the_password_a_request_is_refused(
    method: str, path: str, password: str | None, client: httpx.Client
) -> None:
    auth = None if password is None else httpx.BasicAuth(*f"{password}:".split(":")[:2])
    answer = client.request(method, path, json=None if method == "GET" else {}, auth=auth)
    assert answer.status_code == 401


@contextmanager
def socket(access: Access, path: str, *, host: str | None = None, plain: bool = False) -> Iterator[Any]:
    """A WebSocket to the server, as a foreign page would open it."""
    headers = {"Host": host} if host else {}
    url = f"{access.api_url.replace('http', 'ws')}/{path}"
    protocols: Any = None if plain else ["prefect"]
    opening = connect(
        url,
        subprotocols=protocols,
        origin=FOREIGN,  # type: ignore[arg-type]  # a NewType of str
        additional_headers=headers,
        proxy=None,
        open_timeout=60,
    )
    with opening as opened:
        yield opened


@pytest.mark.parametrize("path", SOCKETS)
def test_without_the_password_a_websocket_is_refused(path: str, access: Access) -> None:
    with pytest.raises(InvalidStatus, match="403"), socket(access, path, plain=True):
        pass
    for token in (None, "", "fedpool:wrong"):
        with socket(access, path) as opened:
            opened.send(json.dumps({"type": "auth", "token": token}))
            with pytest.raises(ConnectionClosed) as closed:
                opened.recv(60)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008


def test_with_the_password_requests_and_websockets_are_answered(access: Access, client: httpx.Client) -> None:
    assert client.get("/api/hello", headers=access.headers).status_code == 200
    with socket(access, "events/out") as opened:
        opened.send(json.dumps({"type": "auth", "token": access.password}))
        assert json.loads(opened.recv(60)) == {"type": "auth_success"}


def test_each_server_has_its_own_password(access: Access) -> None:
    assert access.password != Access.new(access.port).password
    assert len(access.password) > 32 and access.password not in repr(access)


@pytest.mark.parametrize("host", ["page.example", "127.0.0.1.page.example", "localhost.page.example:80"])
def test_a_foreign_host_is_refused(host: str, client: httpx.Client, access: Access) -> None:
    """A page whose name is made to point to this machine (DNS rebinding) sends its own name."""
    for path in ("/", "/api/health", "/api/hello", "/ui-settings"):
        assert client.get(path, headers={"Host": host}).status_code == 400
    with pytest.raises(InvalidStatus, match="400"), socket(access, "events/out", host=host):
        pass


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_both_names_of_this_machine_are_its_own(name: str, client: httpx.Client) -> None:
    assert client.get("/api/health", headers={"Host": f"{name}:{client.base_url.port}"}).json() is True


def test_the_page_that_signs_in_is_the_same_for_everyone_and_runs_only_its_own_script(
    client: httpx.Client, access: Access
) -> None:
    page = client.get(SIGN_IN)
    assert page.status_code == 200 and access.password not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
