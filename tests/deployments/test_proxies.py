"""Loopback connections bypass any proxy that the environment names; a server behind a proxy is
reached through it.
"""

import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from fedpool.deployments.access import Access
from fedpool.loopback import bypass_proxies
from tests.conftest import ADD_ONE
from tests.http_proxy import Proxy
from tests.poc import processes_of, wait_until_gone
from tests.servers import stock_server

PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_proxy_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        for spelling in (name, name.lower()):
            monkeypatch.setenv(spelling, "")  # so that monkeypatch restores the original value
            monkeypatch.delenv(spelling)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    with closing(Proxy(tmp_path)) as started:
        yield started
    wait_until_gone(processes_of, tmp_path)


def test_without_a_proxy_the_environment_stays_as_it_is() -> None:
    before = dict(os.environ)
    bypass_proxies()
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
def test_the_loopback_is_added_once_to_what_bypasses_the_proxy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "in.house, localhost")
    bypass_proxies("127.0.1.1", "fl.example")
    assert os.environ["NO_PROXY"] == "in.house,localhost,127.0.0.1,::1,0.0.0.0,127.0.1.1"
    bypass_proxies()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "in.house,localhost,127.0.0.1,::1,0.0.0.0,127.0.1.1"


def test_of_two_spellings_the_one_that_counts_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "ignored.example")
    monkeypatch.setenv("no_proxy", "*")
    bypass_proxies()
    assert os.environ["no_proxy"] == "*"


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Access]:
    """A server that has a name which only the proxy resolves."""
    with stock_server(tmp_path / "remote") as server:
        yield dataclasses.replace(server, address=f"http://fl.example:{server.port}")


def test_the_proxy_of_these_tests_is_one(proxy: Proxy, remote: Access) -> None:
    url = httpx.URL(remote.api_url)
    assert httpx.get(f"{url}/health", proxy=proxy.url).json() is True
    assert proxy.asked == [f"GET fl.example:{url.port}"]


def run_job(folder: Path, environment: str, **variables: str) -> str:
    """Run a job in its own process; returns its output."""
    (folder / "client.py").write_text(textwrap.dedent(ADD_ONE))
    (folder / "job.py").write_text(
        textwrap.dedent(
            f"""
            import numpy as np
            from fedpool import FedAvgRecipe, PocEnv, SimEnv

            env = {environment}
            model = {{"w": np.zeros(3)}}
            recipe = FedAvgRecipe(name="proxied", min_clients=2, num_rounds=2, model=model, train_script="client.py")
            try:
                assert recipe.execute(env).get_result().params["w"].tolist() == [2, 2, 2]
            finally:
                if isinstance(env, PocEnv):
                    env.down()
            """
        )
    )
    plain = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    done = subprocess.run(
        [sys.executable, "job.py"],
        cwd=folder,
        env=plain | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_private_server_is_not_asked_through_a_proxy(proxy: Proxy, tmp_path: Path) -> None:
    every = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "all_proxy"), proxy.url)
    run_job(tmp_path, "SimEnv()", **every)
    assert proxy.asked == []


def test_with_a_socks_proxy_a_private_server_is_reached_all_the_same(tmp_path: Path) -> None:
    run_job(tmp_path, "SimEnv()", ALL_PROXY="socks5h://127.0.0.1:9")


def test_a_server_that_only_the_proxy_can_reach_is_reached(proxy: Proxy, remote: Access, tmp_path: Path) -> None:
    run_job(tmp_path, "SimEnv()", HTTP_PROXY=proxy.url, **remote.environment)
    asked = set(proxy.asked)
    assert {host for _, _, host in (line.partition(" ") for line in asked)} == {f"fl.example:{remote.port}"}
    assert {method for method, _, _ in (line.partition(" ") for line in asked)} >= {
        "CONNECT",
        "GET",
    }  # WebSockets too


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", ", s3=True"])
def test_nothing_of_a_proof_of_concept_goes_through_a_proxy(options: str, proxy: Proxy, tmp_path: Path) -> None:
    run_job(tmp_path, f"PocEnv(num_clients=2, home='home'{options})", HTTP_PROXY=proxy.url, https_proxy=proxy.url)
    assert proxy.asked == []
    wait_until_gone(processes_of, tmp_path / "home")
