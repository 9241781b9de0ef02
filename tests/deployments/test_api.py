"""If the Prefect server is unreachable, or isn't a Prefect server, every call says so in one
sentence within seconds.
"""

import re
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from fedpool import ConfigError, FedAvgRecipe, ProdEnv, ServerError, SimEnv
from fedpool.cli import main
from fedpool.deployments.api import check_server
from fedpool.deployments.server import free_port
from tests.conftest import ADD_ONE


@pytest.fixture
def dead() -> Iterator[str]:
    """An API URL that nothing listens on."""
    url = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}):
        yield url


@pytest.fixture
def recipe(write_script: Callable[..., Path]) -> FedAvgRecipe:
    return FedAvgRecipe(
        name="dead", min_clients=2, num_rounds=1, model={"w": np.zeros(1)}, train_script=write_script(ADD_ONE)
    )


def test_a_simulation_says_so_and_leaves_nothing_behind(dead: str, recipe: FedAvgRecipe, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ServerError) as caught:
        recipe.execute(SimEnv(workspace=tmp_path / "runs", progress=False))
    assert time.monotonic() - began < 30  # Prefect takes longer on an idle machine than fedpool does on a busy one
    message = str(caught.value)
    assert message.startswith(f"the Prefect server at {dead} does not answer (") and "\n" not in message
    assert message.endswith("start it, or unset PREFECT_API_URL to use a private server")
    assert "direct cause" not in "".join(
        traceback.format_exception(caught.value)
    )  # otherwise, users would see pages of httpx first
    assert [path.name for path in (tmp_path / "runs").glob("*")] == []


def test_production_says_so_before_anything_is_staged(dead: str, recipe: FedAvgRecipe, tmp_path: Path) -> None:
    env = ProdEnv(api_url=dead, store=str(tmp_path / "store"), sites=("a", "b"), progress=False)
    for call in (env.execute, env.deploy):
        with pytest.raises(ServerError, match=r"does not answer .*: start it, or correct api_url$"):
            call(recipe)
    assert list((tmp_path / "store").glob("*")) == []


@pytest.mark.parametrize(
    "command", [["job", "logs", "a-job"], ["job", "cancel", "a-job"], ["site", "register", "a", "--pool", "a"]]
)
def test_a_command_says_so_in_one_line(command: list[str], dead: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(command)
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert f"the Prefect server at {dead} does not answer" in printed.err and "PREFECT_API_URL" in printed.err


@pytest.mark.parametrize(
    "url", ["foo", "127.0.0.1:4200/api", "localhost:4200", "ftp://host/api", "http:///api", "http://a:b:c"]
)
def test_a_setting_that_is_no_url_is_told_as_that(url: str, recipe: FedAvgRecipe, tmp_path: Path) -> None:
    words = rf"^PREFECT_API_URL='{re.escape(url)}' is not a URL: correct PREFECT_API_URL of the Prefect profile '.*' to one "
    env = ProdEnv(store=str(tmp_path / "store"), sites=("a", "b"), progress=False)
    with temporary_settings({PREFECT_API_URL: url}):
        for ask in (check_server, lambda: env.execute(recipe), lambda: recipe.execute(SimEnv(workspace=tmp_path))):
            with pytest.raises(ConfigError, match=words):
                ask()


class _Answers(BaseHTTPRequestHandler):
    status, kind = 200, "text/html"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Type", self.kind)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.mark.parametrize(
    ("status", "path", "words"),
    [
        (
            200,
            "",
            r"there is no Prefect API at .*: such a URL ends in /api, so try http://127.0.0.1:\d+/api$",
        ),
        (404, "/", r"there is no Prefect API at .*HTTP 404 Not Found.*, so try http://127.0.0.1:\d+/api$"),
        (404, "/api", r"there is no Prefect API at .*HTTP 404 Not Found.: such a URL ends in /api$"),
        (401, "", r"refused access \(401 Unauthorized\): check PREFECT_API_AUTH_STRING"),
        (502, "", "does not answer .HTTP 502 Bad Gateway.: start it"),
    ],
)
def test_what_answers_and_is_no_prefect_server_is_told_from_one(status: int, path: str, words: str) -> None:
    handler = type("Answers", (_Answers,), {"status": status})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            with (
                temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}{path}"}),
                pytest.raises(ServerError, match=words),
            ):
                check_server()
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_takes_the_connection_and_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpool.deployments.api._ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}), pytest.raises(ServerError, match=r"no answer within 0.2 s"):
            check_server()


def test_where_no_server_is_configured_the_setting_is_named() -> None:
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ConfigError, match="set PREFECT_API_URL"),
    ):
        check_server()


def test_a_server_that_answers_is_named(prefect_api: str) -> None:
    assert check_server() == prefect_api
