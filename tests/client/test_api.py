"""The client API: its state machine against an in-memory host, its wire protocol, and its module
functions in separate scripts.
"""

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpool.arrays import ParamsFormat, as_bytes
from fedpool.client.api import Client, start
from fedpool.client.hosts import Assignment, Host, SessionHost, Standalone, Waiting, Welcome
from fedpool.client.link import ADDRESS_VARIABLE, KEY_VARIABLE, LINK_PROTOCOL, Link, connect
from fedpool.client.ranks import TorchrunHost, find_host
from fedpool.client.seeding import seed_everything
from fedpool.errors import ClientError, FedpoolError
from fedpool.model import FLModel, ParamsType
from tests.hosts import MemoryHost, host_of

FORMATS: tuple[ParamsFormat, ...] = ("torch", "numpy")


def received(client: Client) -> FLModel:
    model = client.receive()
    assert model is not None
    return model


def params_of(model: FLModel) -> Mapping[str, Any]:
    assert model.params is not None
    return model.params


MODEL = {"w": np.array([1.0, 2.0], dtype=np.float32)}


class TestTheLoop:
    """Which calls are allowed when."""

    def test_a_job_of_two_rounds_runs_twice_and_ends(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, MODEL, {"w": MODEL["w"] + 1})
        client = Client(host, "numpy")
        seen = []
        while client.is_running():
            model = received(client)
            seen.append((model.current_round, model.total_rounds, params_of(model)["w"].tolist()))
            client.send(FLModel(params=model.params))
        assert seen == [(0, 2, [1.0, 2.0]), (1, 2, [2.0, 3.0])]
        assert [update["round"] for update in host.updates] == [0, 1]
        assert client.is_running() is False
        assert client.receive() is None

    def test_it_is_between_rounds_from_a_send_to_the_next_assignment(self, tmp_path: Path) -> None:
        client = Client(host_of(tmp_path, MODEL, MODEL), "numpy")
        seen = [client.between_rounds]
        while client.is_running():
            seen.append(client.between_rounds)
            client.send(FLModel(params=received(client).params))
            seen.append(client.between_rounds)
        assert seen == [False, False, True, False, True]

    def test_receive_without_is_running_fetches_the_assignment_itself(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, MODEL)
        assert received(Client(host)).current_round == 0

    def test_receive_twice_in_a_round_gives_the_same_model(self, tmp_path: Path) -> None:
        client = Client(host_of(tmp_path, MODEL))
        assert client.receive() is received(client)

    def test_receive_with_a_timeout_gives_none_and_later_the_model(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, MODEL)
        host.plan.insert(0, None)
        client = Client(host)
        assert client.receive(timeout=0.5) is None
        assert received(client).current_round == 0
        assert host.timeouts == [0.5, None]

    def test_a_received_model_is_full_and_complete(self, tmp_path: Path) -> None:
        model = received(Client(host_of(tmp_path, MODEL)))
        assert (model.params_type, model.start_round, model.current_round, model.total_rounds) == (
            ParamsType.FULL,
            0,
            0,
            1,
        )
        assert model.metrics is None

    def test_who_and_what_the_script_is(self, tmp_path: Path) -> None:
        client = Client(host_of(tmp_path, MODEL, task="evaluate"))
        assert (client.job_id, client.site_name, client.config) == ("job-1", "site-1", {"lr": 0.1})
        client.is_running()
        assert client.task_name == "evaluate"

    def test_changing_the_config_does_not_change_the_next_one(self, tmp_path: Path) -> None:
        client = Client(host_of(tmp_path, MODEL))
        client.config["lr"] = 5
        assert client.config == {"lr": 0.1}

    def test_there_is_no_task_outside_a_round(self, tmp_path: Path) -> None:
        client = Client(host_of(tmp_path, MODEL))
        with pytest.raises(ClientError, match="there is no task yet: call this between"):
            _ = client.task_name
        client.receive()
        client.send(FLModel(metrics={"a": 1}))
        with pytest.raises(ClientError, match="there is no task yet"):
            _ = client.task_name

    def test_shutdown_says_goodbye_to_the_host(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, MODEL)
        Client(host).shutdown()
        assert host.closed

    def test_after_shutdown_the_script_takes_part_in_nothing_more(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, MODEL)
        client = Client(host)
        client.shutdown()
        assert client.is_running() is False
        assert client.receive() is None
        assert host.timeouts == []


class TestSend:
    """What is sent, and what is refused."""

    def test_send_before_receive_is_refused(self, tmp_path: Path) -> None:
        client = Client(host_of(tmp_path, MODEL))
        for _ in range(2):  # before is_running(), and after it
            with pytest.raises(
                ClientError, match=r"send\(\) was called before receive\(\): call flare\.receive\(\) first"
            ):
                client.send(FLModel(params=MODEL))
            client.is_running()

    def test_a_second_send_in_a_round_is_refused(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, MODEL)
        client = Client(host)
        client.receive()
        client.send(FLModel(params=MODEL))
        with pytest.raises(ClientError, match=r"round 0 was already sent: call flare\.is_running\(\)"):
            client.send(FLModel(params=MODEL))
        assert len(host.updates) == 1

    @pytest.mark.parametrize(
        ("model", "words"),
        [
            ({"w": 1}, r"send\(\) takes a flare\.FLModel, got dict: wrap it as flare\.FLModel"),
            (None, "got NoneType"),
            (FLModel(), "neither params nor metrics: give flare.FLModel"),
            (FLModel(params=[1, 2]), r"params must be a dict of name -> array, got list: send model\.state_dict\(\)"),  # type: ignore[arg-type]
            (FLModel(params=torch.nn.Linear(1, 1)), "params must be a dict of name -> array, got Linear"),  # type: ignore[arg-type]
            (FLModel(params={"w": [1.0, 2.0]}), r"params\['w'\] is a list: give a torch tensor or a numpy array"),
            (FLModel(params={"w": np.array([1j])}), r"params\['w'\] has dtype complex128"),
            (FLModel(metrics={"acc": [1, 2]}), r"metrics\['acc'\] must be one number, got list"),
            (FLModel(metrics={"acc": None}), r"metrics\['acc'\] must be one number, got NoneType"),
            (FLModel(metrics={"acc": "high"}), r"metrics\['acc'\] must be one number, got str"),
            (FLModel(metrics={"acc": torch.ones(2)}), r"metrics\['acc'\] must be one number, got Tensor"),
            (FLModel(metrics={"acc": np.ones(2)}), r"metrics\['acc'\] must be one number, got ndarray"),
            (FLModel(metrics={"a": 1}, meta={"x": [1]}), r"meta\['x'\] must be a number .* got list: send arrays as params"),
            (FLModel(metrics={"a": 1}, meta={"x": np.ones(2)}), r"meta\['x'\] must be a number .* got ndarray"),
            (FLModel(metrics={"a": 1}, meta={"x": torch.ones(2)}), r"meta\['x'\] must be a number .* got Tensor"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_sent_is_refused_with_what_to_do_and_a_good_model_may_follow(
        self, model: Any, words: str, tmp_path: Path
    ) -> None:
        host = host_of(tmp_path, MODEL)
        client = Client(host)
        client.receive()
        with pytest.raises(ClientError, match=words):
            client.send(model)
        assert host.sent == []
        client.send(FLModel(params=MODEL))
        assert len(host.updates) == 1

    def test_params_that_cannot_be_sent_are_refused_by_name(self, tmp_path: Path) -> None:
        client = Client(host_of(tmp_path, MODEL), "numpy")
        client.receive()
        with pytest.raises(ClientError, match=r"params\['w'\] has dtype complex128"):
            client.send(FLModel(params={"w": np.array([1j, 2j])}))

    def test_an_update_says_what_its_file_holds(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, MODEL)
        client = Client(host)
        client.receive()
        client.send(
            FLModel(params={**MODEL, "b": np.zeros(3)}, metrics={"acc": 0.5}, meta={"NUM_STEPS_CURRENT_ROUND": 7})
        )
        (update,) = host.updates
        assert (update["round"], update["params_type"], update["num_params"]) == (0, "FULL", 2)
        assert (update["metrics"], update["meta"]) == ({"acc": 0.5}, {"NUM_STEPS_CURRENT_ROUND": 7})
        assert set(host.params_sent()) == {"w", "b"}

    def test_metrics_alone_write_no_file(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, MODEL)
        client = Client(host)
        client.receive()
        client.send(FLModel(metrics={"acc": 0.5}))
        assert host.updates[0]["params_type"] is None
        assert not (tmp_path / "update-0").exists()

    def test_an_evaluation_sends_metrics_only_even_when_the_script_trained(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, MODEL, task="evaluate")
        client = Client(host)
        client.receive()
        client.send(FLModel(params=MODEL, metrics={"acc": 0.5}))
        assert (host.updates[0]["params_type"], host.updates[0]["metrics"]) == (None, {"acc": 0.5})
        assert not (tmp_path / "update-0").exists()

    def test_the_sites_own_model_is_sent_when_it_is_asked_for(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, MODEL, task="submit_model")
        client = Client(host, "numpy")
        client.receive()
        client.send(FLModel(params={"w": MODEL["w"] * 2}))
        assert host.params_sent()["w"].tolist() == [2.0, 4.0]

    def test_numbers_of_every_library_are_metrics_and_meta(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, MODEL)
        client = Client(host)
        client.receive()
        client.send(
            FLModel(
                metrics={
                    "a": 1,
                    "b": np.float32(0.5),
                    "c": torch.tensor(0.25, requires_grad=True),
                    "d": np.array([2]),
                    "e": True,
                },
                meta={"i": np.int64(3), "t": torch.tensor(4), "s": "text", "n": None, "nan": float("nan")},
            )
        )
        assert host.updates[0]["metrics"] == {"a": 1.0, "b": 0.5, "c": 0.25, "d": 2.0, "e": 1.0}
        assert host.updates[0]["meta"] == {"i": 3, "t": 4, "s": "text", "n": None, "nan": "nan"}
        json.dumps(host.updates[0])

    def test_a_logged_scalar_goes_to_the_host_with_where_it_belongs(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, MODEL)
        Client(host).log("loss", torch.tensor(0.5), global_step=12)
        assert host.sent == [{"kind": "log", "key": "loss", "value": 0.5, "where": {"global_step": "12"}}]

    def test_what_is_no_scalar_cannot_be_logged(self, tmp_path: Path) -> None:
        with pytest.raises(ClientError, match=r"log\('loss'\) must be one number, got ndarray"):
            Client(host_of(tmp_path, MODEL)).log("loss", np.ones(3))


TRAVELLERS = {
    "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "float16": torch.tensor([[0.1], [3e-5]], dtype=torch.float16),
    "float32": torch.tensor([0.1, -0.0, 1e-40]),
    "float64": torch.tensor([1 / 3], dtype=torch.float64),
    "int64": torch.tensor([2**62 + 1, -5]),
    "uint8": torch.tensor([0, 255], dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "zero_d": torch.tensor(3.25),
    "zero_d_int": torch.tensor(7),
    "zero_d_bool": torch.tensor(True),
    "empty": torch.empty(0, 3),
}


class TestParams:
    """How params are received and sent."""

    @pytest.mark.parametrize("params_format", FORMATS)
    def test_tensors_of_every_dtype_and_shape_travel_unchanged_in_and_out(
        self, params_format: ParamsFormat, tmp_path: Path
    ) -> None:
        host = host_of(tmp_path, TRAVELLERS)
        client = Client(host, params_format)
        model = received(client)
        client.send(FLModel(params=model.params))
        wanted = torch.Tensor if params_format == "torch" else np.ndarray
        assert all(isinstance(value, wanted) for value in params_of(model).values())
        assert (tmp_path / "update-0").read_bytes() == (tmp_path / "global-0").read_bytes()
        for name, value in host.params_sent().items():
            assert (value.dtype, value.shape, bytes(as_bytes(value))) == (
                TRAVELLERS[name].dtype,
                TRAVELLERS[name].shape,
                bytes(as_bytes(TRAVELLERS[name])),
            )

    def test_params_arrive_as_torch_when_the_script_has_imported_it(self, tmp_path: Path) -> None:
        assert "torch" in sys.modules
        assert isinstance(params_of(received(Client(host_of(tmp_path, MODEL))))["w"], torch.Tensor)

    def test_a_wrong_params_format_is_refused(self) -> None:
        with pytest.raises(ClientError, match='params_format must be "torch" or "numpy", got \'jax\''):
            start(None, "jax")  # type: ignore[arg-type]  # that is the point

    def test_a_module_in_training_can_be_sent(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)})
        client = Client(host)
        module = torch.nn.Linear(2, 1)
        module.load_state_dict(params_of(received(client)))
        with torch.no_grad():
            module.weight += 2
        client.send(FLModel(params=dict(module.named_parameters())))
        assert host.params_sent()["weight"].tolist() == [[2.0, 2.0]]

    def test_a_declared_difference_is_sent_as_it_is(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, MODEL)
        client = Client(host)
        client.receive()
        client.send(FLModel(params_type=ParamsType.DIFF, params={"w": np.array([0.5, 0.5], dtype=np.float32)}))
        assert host.updates[0]["params_type"] == "DIFF"
        assert host.params_sent()["w"].tolist() == [0.5, 0.5]


class TestExcludedParams:
    """Parameters that stay at the site."""

    BASE = {"body.w": np.zeros(2, dtype=np.float32), "head.w": np.zeros(2, dtype=np.float32)}  # noqa: RUF012  # never changed

    @pytest.mark.parametrize("params_format", FORMATS)
    def test_they_are_not_sent_and_come_back_in_the_next_round(
        self, params_format: ParamsFormat, tmp_path: Path
    ) -> None:
        host = host_of(tmp_path, self.BASE, self.BASE, exclude=("^head",))
        client = Client(host, params_format)
        assert params_of(received(client))["head.w"].tolist() == [0.0, 0.0]
        client.send(FLModel(params={name: value + 3 for name, value in self.BASE.items()}))
        assert set(host.params_sent(0)) == {"body.w"}
        assert host.updates[0]["num_params"] == 1
        model = received(client)
        assert {name: value.tolist() for name, value in params_of(model).items()} == {
            "body.w": [0.0, 0.0],
            "head.w": [3.0, 3.0],
        }

    def test_a_difference_of_them_is_no_value_to_go_on_from(self, tmp_path: Path) -> None:
        host = host_of(tmp_path, self.BASE, self.BASE, exclude=("^head",))
        client = Client(host, "numpy")
        client.receive()
        client.send(FLModel(params_type="DIFF", params={name: value + 3 for name, value in self.BASE.items()}))
        assert params_of(received(client))["head.w"].tolist() == [0.0, 0.0]

    def test_a_script_may_send_them_back_as_it_received_them(self, tmp_path: Path) -> None:
        # In a separate process: the received tensors are memory-mapped from the file that send()
        # rewrites, and truncating a mapped file kills any process that reads it.
        code = f"""
import sys, torch
from pathlib import Path
from fedpool.arrays import load_arrays, save_and_hash
from fedpool.client.api import Client
from fedpool.client.hosts import Assignment, Welcome
from fedpool.model import FLModel
folder = Path({str(tmp_path)!r})
for name, head in (("global", 0.0), ("kept", 7.0)):
    path = folder / ("global" if name == "global" else "kept/00000/excluded.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        params = {{"body": torch.zeros(100_000), "head": torch.full((100_000,), head)}}
        save_and_hash(file, params if name == "global" else {{"head": params["head"]}})
class Host:
    welcome = Welcome("job", "site-1")
    rounds = iter(range(1, 4))
    def next(self, timeout):
        round = next(self.rounds, None)
        paths = {{name: str(folder / name) for name in ("update", "kept")}}
        return None if round is None else Assignment(round, 3, exclude=("head",), model=str(folder / "global"), **paths)
    def params(self, assignment, params_format):
        return load_arrays(assignment.model, params_format)
    def put(self, kind, **fields): pass
client = Client(Host(), "torch")
while client.is_running():
    model = client.receive()
    print(model.params["head"].mean().item(), flush=True)
    client.send(FLModel(params=model.params))
print("after", model.params["head"].mean().item())
"""
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
        assert ran.stdout.split() == ["7.0", "7.0", "7.0", "after", "7.0"], ran.stderr
        assert ran.returncode == 0


class TestWhatASiteKeeps:
    """Tensors that a site keeps from round to round."""

    BASE = {"w": np.zeros(2, dtype=np.float32)}  # noqa: RUF012  # never changed

    def client(self, folder: Path, num_rounds: int, first: int = 0) -> Client:
        """A client whose first round is `first`, as in a restarted script."""
        host = host_of(folder, *[self.BASE] * num_rounds)
        return Client(MemoryHost(folder, host.plan[first:]), "numpy")

    def keep(self, client: Client, value: float) -> float | None:
        """Run a round that keeps a value; returns the value kept before."""
        received(client)
        before = client.kept("mine")
        client.keep("mine", {"x": np.array([value])})
        client.send(FLModel(params=self.BASE))
        return None if before is None else float(before["x"][0])

    def test_it_comes_back_in_the_next_round(self, tmp_path: Path) -> None:
        client = self.client(tmp_path, 3)
        assert [self.keep(client, value) for value in (5.0, 6.0, 7.0)] == [None, 5.0, 6.0]

    def test_a_round_that_is_done_again_starts_from_what_was_kept_before_it(self, tmp_path: Path) -> None:
        client = self.client(tmp_path, 3)
        assert [self.keep(client, value) for value in (5.0, 6.0)] == [None, 5.0]
        again = self.client(tmp_path, 3, first=1)
        assert [self.keep(again, value) for value in (6.5, 7.0)] == [5.0, 6.5]

    def test_no_more_than_two_rounds_of_it_stay(self, tmp_path: Path) -> None:
        client = self.client(tmp_path, 4)
        for value in range(4):
            self.keep(client, value)
        assert [path.name for path in sorted((tmp_path / "kept").iterdir())] == ["00002", "00003"]

    def test_outside_a_round_and_with_a_wrong_name_or_value_it_is_refused(self, tmp_path: Path) -> None:
        client = self.client(tmp_path, 1)
        with pytest.raises(ClientError, match=r"kept\(\) was called outside a round"):
            client.kept("mine")
        received(client)
        with pytest.raises(ClientError, match=r"name '\.\./mine' cannot be part of a path"):
            client.keep("../mine", self.BASE)
        with pytest.raises(ClientError, match=r"keep\('mine'\) takes a dict of name -> array"):
            client.keep("mine", {"x": "text"})

    def test_extras_that_are_no_dict_of_dicts_are_refused(self, tmp_path: Path) -> None:
        client = self.client(tmp_path, 1)
        received(client)
        with pytest.raises(ClientError, match="extras must be a dict of group"):
            client.send(FLModel(params=self.BASE, extras={"control": np.zeros(2)}))  # type: ignore[dict-item]


class TestSeeds:
    """Each assignment seeds the generators of the libraries that the script has imported."""

    def draws(self) -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))  # deliberately the global generators

    def test_one_seed_gives_one_sequence_in_every_library(self) -> None:
        seed_everything(2**63 - 1)
        first = self.draws()
        second = self.draws()
        seed_everything(2**63 - 1)
        assert self.draws() == first != second

    def test_each_round_is_seeded_with_its_own_seed(self, tmp_path: Path) -> None:
        host = MemoryHost(tmp_path, [Assignment(0, 3, seed=1), Assignment(1, 3, seed=2), Assignment(2, 3, seed=1)])
        client = Client(host)
        seen = []
        while client.is_running():
            client.receive()
            seen.append(self.draws())
            client.send(FLModel(metrics={"a": 1}))
        assert seen[0] == seen[2]
        assert all(a != b for a, b in zip(seen[0], seen[1], strict=True))

    def test_without_a_seed_nothing_is_seeded(self, tmp_path: Path) -> None:
        seed_everything(5)
        expected = self.draws()
        seed_everything(5)
        Client(MemoryHost(tmp_path, [Assignment(0, 1)])).is_running()
        assert self.draws() == expected


def session() -> tuple[SessionHost, Link]:
    """A session host that has received its welcome, and the other end of its link."""
    ours, theirs = Pipe()
    other = Link(theirs)
    other.put("welcome", **asdict(Welcome("job-1", "site-1", {"lr": 0.1}, 4, 5)))
    host = SessionHost(Link(ours))
    hello = other.get()
    assert (hello["kind"], hello["protocol"]) == ("hello", LINK_PROTOCOL)
    return host, other


class TestSessionHost:
    """The client's end of the wire."""

    def test_it_learns_who_it_is_from_the_welcome(self) -> None:
        host, _ = session()
        assert host.welcome == Welcome("job-1", "site-1", {"lr": 0.1}, 4, 5)

    def test_it_gets_assignments_until_the_end(self) -> None:
        host, other = session()
        other.put("assignment", assignment={"round": 3, "total_rounds": 5, "exclude": ["^head", "bias$"], "seed": 9})
        assert host.next(None) == Assignment(3, 5, exclude=("^head", "bias$"), seed=9)
        other.put("end")
        assert host.next(None) is None
        assert [other.get()["kind"] for _ in range(2)] == ["next", "next"]

    def test_a_time_out_asks_only_once(self) -> None:
        host, other = session()
        for _ in range(3):
            with pytest.raises(Waiting):
                host.next(0)
        other.put("assignment", assignment={"round": 0, "total_rounds": 1, "exclude": []})
        assert host.next(0) == Assignment(0, 1)
        assert other.get()["kind"] == "next"
        assert not other.connection.poll()

    def test_messages_arrive_as_they_were_put(self) -> None:
        host, other = session()
        host.put("log", key="loss", value=float("inf"), where={})
        message = other.get()
        assert abs(message.pop("time") - time.time()) < 60
        assert message == {"kind": "log", "key": "loss", "value": float("inf"), "where": {}}

    def test_scalars_that_come_fast_are_sent_together_and_before_anything_else(self) -> None:
        host, other = session()
        for step in range(1000):
            host.put("log", key="loss", value=1.0 * step, where={"global_step": str(step)})
        host.put("update", round=0)
        messages = [other.get()]
        while messages[-1]["kind"] != "update":
            messages.append(other.get())
        # If the machine stalls, slow scalars may be sent singly, but not every scalar needs its own
        # message.
        assert len(messages) < 200
        scalars = [each for message in messages[:-1] for each in message.get("scalars", [message])]
        assert [each["value"] for each in scalars] == list(range(1000))
        times = [each["time"] for each in scalars]
        assert times == sorted(times) and time.time() - 60 < times[0]

    def test_a_scalar_that_comes_alone_is_sent_at_once(self) -> None:
        host, other = session()
        host.put("log", key="loss", value=1.0, where={})
        assert other.connection.poll(60)

    def test_without_a_global_model_params_are_empty(self) -> None:
        host, _ = session()
        assert host.params(Assignment(0, 1), "numpy") == {}

    def test_closing_says_goodbye_once(self) -> None:
        host, other = session()
        host.close()
        assert other.get() == {"kind": "bye"}
        with pytest.raises(EOFError):
            other.get()

    def test_a_host_that_is_gone_is_an_error_that_says_so(self) -> None:
        host, other = session()
        other.close()
        with pytest.raises(ClientError, match=r"the session host is gone .*: end this script"):
            host.next(None)
        with pytest.raises(ClientError, match="the session host is gone"):
            host.put("log", key="a", value=1.0, where={})
        host.close()  # nobody to say goodbye to

    def test_a_host_that_goes_while_the_script_waits_is_an_error_too(self) -> None:
        host, other = session()

        def leave_after_a_message() -> None:
            other.get()
            other.close()

        thread = threading.Thread(target=leave_after_a_message)
        thread.start()
        with pytest.raises(ClientError, match="the session host is gone"):
            host.next(None)
        thread.join()

    def test_the_environment_says_where_the_host_is_and_the_key_proves_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
        assert connect() is None
        monkeypatch.chdir(tmp_path)  # the path of a Unix socket is limited to about 100 bytes
        monkeypatch.setenv(ADDRESS_VARIABLE, "s")
        outcomes: list[Any] = []
        with Listener("s", family="AF_UNIX", authkey=b"right") as listener:

            def answer() -> None:
                try:
                    Link(listener.accept()).put("welcome")
                except AuthenticationError as error:
                    outcomes.append(error)

            for key in (b"right", b"wrong"):
                thread = threading.Thread(target=answer)
                thread.start()
                monkeypatch.setenv(KEY_VARIABLE, key.hex())
                try:
                    link = connect()
                    assert link is not None
                    outcomes.append(link.get())
                    link.close()
                except AuthenticationError:
                    outcomes.append("refused")
                thread.join()
        assert outcomes[0] == {"kind": "welcome"}
        assert "refused" in outcomes
        assert len(outcomes) == 3


class TestFindingTheHost:
    """Which host a process gets, depending on its environment."""

    @pytest.fixture(autouse=True)
    def _bare_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (ADDRESS_VARIABLE, "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)

    def test_with_nobody_around_a_script_runs_standalone(self) -> None:
        assert isinstance(find_host(None), Standalone)

    def test_a_torchrun_of_one_process_is_like_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert isinstance(find_host(None), Standalone)

    @pytest.mark.parametrize("given", [None, 1])
    def test_a_rank_above_0_gets_everything_by_broadcast(
        self, given: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        if given is None:
            monkeypatch.setenv("RANK", "1")
        host = find_host(given)
        assert isinstance(host, TorchrunHost)
        with pytest.raises(
            ClientError, match=r"ranks above 0 learn site, job and config in their first flare\.is_running\(\)"
        ):
            _ = host.welcome

    @pytest.mark.parametrize(("node", "local", "talks"), [("0", "0", True), ("0", "1", False), ("1", "0", False)])
    def test_lightnings_launcher_gives_no_global_rank_but_tells_rank_0_from_the_others(
        self, node: str, local: str, talks: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {"WORLD_SIZE": "4", "NODE_RANK": node, "LOCAL_RANK": local}.items():
            monkeypatch.setenv(name, value)
        host = find_host(None)
        assert isinstance(host, TorchrunHost)
        if talks:
            assert host.welcome.job_id == "standalone"
        else:
            with pytest.raises(ClientError, match="ranks above 0"):
                _ = host.welcome

    def test_rank_0_of_many_knows_who_it_is_and_needs_a_process_group(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        host = find_host(0)
        assert isinstance(host, TorchrunHost)
        assert host.welcome.job_id == "standalone"
        with pytest.raises(
            ClientError, match=r"call torch\.distributed\.init_process_group\(\) before the first flare\.is_running"
        ):
            host.next(None)

    def test_every_host_answers_to_the_same_methods(self, tmp_path: Path) -> None:
        hosts: list[Host] = [MemoryHost(tmp_path, []), Standalone(), TorchrunHost(0, Standalone()), session()[0]]
        for host in hosts:
            assert all(callable(getattr(host, name)) for name in ("next", "params", "put", "note", "close"))
            assert isinstance(host.welcome, Welcome)


def run_script(code: str, *options: str) -> str:
    ran = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def before_init() -> dict[str, str]:
    """The error of every function called before init(), by the function's name."""
    code = """
import json
import fedpool.client as flare
calls = {name: getattr(flare, name) for name in flare.__all__ if name[0].islower() and name not in ("init", "prox_loss")}
calls["send"] = lambda: flare.send(flare.FLModel(metrics={"a": 1}))
calls["log"] = lambda: flare.log("a", 1)
calls["keep"] = lambda: flare.keep("a", {})
calls["kept"] = lambda: flare.kept("a")
for decorator in ("train", "evaluate"):
    calls[decorator] = calls[decorator](lambda model: model)
errors = {}
for name, call in calls.items():
    try:
        call()
        errors[name] = "no error"
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"
print(json.dumps(errors))
"""
    errors: dict[str, str] = json.loads(run_script(code))
    return errors


@pytest.mark.parametrize(
    "name",
    ["get_config", "get_job_id", "get_site_name", "get_task_name", "is_evaluate", "is_running", "is_submit_model", "is_train",
     "keep", "kept", "log", "receive", "send", "shutdown", "system_info"],
)  # fmt: skip
def test_every_function_before_init_says_to_call_it_first(name: str, before_init: dict[str, str]) -> None:
    assert before_init[name] == "ClientError: the client API is not initialised: call flare.init() first"


def test_no_function_escapes_the_check_before_init(before_init: dict[str, str]) -> None:
    assert [name for name, error in before_init.items() if not error.startswith("ClientError")] == []


def test_a_client_error_is_of_fedpools_tree_and_a_runtime_error() -> None:
    assert issubclass(ClientError, FedpoolError)
    assert issubclass(ClientError, RuntimeError)


def test_a_second_init_warns_and_changes_nothing() -> None:
    code = """
import warnings
import fedpool.client as flare
flare.init(params_format="numpy")
first = flare._client
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    flare.init(params_format="torch")
print(first is flare._client, flare._client._params_format(), len(caught), caught[0].message, caught[0].filename)
"""
    last = run_script(code).splitlines()[-1]
    assert last == "True numpy 1 flare.init() was already called: this call changes nothing <string>"


def test_the_module_functions_are_the_clients_methods() -> None:
    code = """
import json
import fedpool.client as flare
flare.init(rank="0")
assert flare.is_running()
tasks = [flare.is_train(), flare.is_evaluate(), flare.is_submit_model()]
names = [flare.get_job_id(), flare.get_site_name(), flare.get_task_name()]
print(json.dumps([*names, flare.get_config(), flare.system_info(), tasks]))
model = flare.receive(timeout=1)
flare.send(flare.FLModel(metrics={"accuracy": 0.5}), clear_cache=False)
assert not flare.is_running()
assert flare.receive() is None
flare.shutdown()
"""
    assert json.loads(run_script(code).splitlines()[1]) == [
        "standalone",
        "site-1",
        "train",
        {},
        {"job_id": "standalone", "site_name": "site-1", "site_index": 0, "num_sites": 1},
        [True, False, False],
    ]


def test_params_arrive_as_numpy_in_a_script_that_has_not_imported_torch() -> None:
    code = """
import sys
import fedpool.client as flare
flare.init()
flare.receive()
print(flare._client._params_format(), "torch" in sys.modules)
"""
    assert run_script(code).splitlines()[-1] == "numpy False"
