"""A script that repeats a round without sending gets an error, whatever it called before: it would
repeat the round for ever.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpool.client.api import Client
from fedpool.client.exchange import Exchange, register
from fedpool.client.hosts import Standalone
from fedpool.errors import ClientError
from fedpool.model import FLModel
from tests.hosts import host_of

MODEL = {"w": np.array([1.0, 2.0], dtype=np.float32)}

GOES_THROUGH: dict[str, Callable[[Client], object]] = {
    "receives": lambda client: client.receive(),
    "receives twice": lambda client: (client.receive(), client.receive()),
    "asks for the task and continues": lambda client: client.task_name,
}


@pytest.mark.parametrize("how", GOES_THROUGH)
def test_a_script_that_does_not_send_is_told_round_site_and_remedy_at_the_second_is_running(
    how: str, tmp_path: Path
) -> None:
    client = Client(host_of(tmp_path, MODEL))
    assert client.is_running()
    GOES_THROUGH[how](client)
    with pytest.raises(
        ClientError,
        match=r"^round 0 at site-1: send\(\) was not called before the next flare\.is_running\(\)\. "
        r"In a round of train, send the trained model, flare\.send\(flare\.FLModel\(params=\.\.\.\)\)$",
    ):
        client.is_running()


def test_a_script_that_calls_nothing_but_is_running_is_told_so_at_the_third(tmp_path: Path) -> None:
    host = host_of(tmp_path, MODEL)
    client = Client(host)
    assert client.is_running()
    assert client.is_running()  # `if is_running(): while is_running():` is not a mistake
    with pytest.raises(ClientError, match=r"send\(\) was not called"):
        client.is_running()
    assert len(host.timeouts) == 1


def test_a_second_look_is_free_in_every_round(tmp_path: Path) -> None:
    client = Client(host_of(tmp_path, MODEL, MODEL))
    for _ in range(2):
        assert client.is_running()
        assert client.is_running()
        client.receive()
        client.send(FLModel(params=MODEL))
    assert not client.is_running()


def test_it_is_told_again_as_often_as_it_tries_and_may_still_send(tmp_path: Path) -> None:
    host = host_of(tmp_path, MODEL)
    client = Client(host)
    client.receive()
    for _ in range(2):
        with pytest.raises(ClientError, match=r"send\(\) was not called"):
            client.is_running()
    client.send(FLModel(params=MODEL))
    assert len(host.updates) == 1


@pytest.mark.parametrize(
    ("task", "remedy"),
    [
        ("evaluate", r"or metrics=\{\} if there is nothing to score"),
        ("submit_model", r"or metrics=\{\} if it has none"),
    ],
)
def test_a_script_that_continues_on_what_it_cannot_do_is_told_how_to_say_so(
    task: str, remedy: str, tmp_path: Path
) -> None:
    host = host_of(tmp_path, MODEL, task=task)
    client = Client(host)
    client.receive()
    with pytest.raises(ClientError, match=rf"In a round of {task}, .*{remedy}"):
        client.is_running()
    client.send(FLModel(metrics={}))
    assert host.updates[0]["metrics"] == {}


def test_with_a_patched_trainer_the_remedy_is_its_own(tmp_path: Path) -> None:
    client, trainer = Client(host_of(tmp_path, {"weight": torch.ones(1, 1)})), torch.nn.Identity()
    assert register(client, trainer, {})
    exchange = Exchange(client, strict=True)
    exchange.receive_to_score()
    exchange.scored({"loss": 1.0})  # as validate() does, in a script that forgets fit()
    with pytest.raises(ClientError, match=r"In a round of train, call fit\(\) or train\(\) of the patched trainer"):
        exchange.client.is_running()


def test_standalone_a_script_is_told_the_same() -> None:
    client = Client(Standalone())
    client.is_running()
    client.receive()
    with pytest.raises(ClientError, match=r"round 0 at site-1: send\(\) was not called"):
        client.is_running()
