"""Under torchrun, only rank 0 talks to the host: the others get site, assignment and model by
broadcast, and their `send` does nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from fedpool.arrays import ParamsFormat, as_bytes, load_arrays, save_and_hash
from fedpool.client.api import Client
from fedpool.client.hosts import Assignment, Waiting, Welcome
from fedpool.client.link import ADDRESS_VARIABLE, KEY_VARIABLE, Link
from fedpool.client.ranks import TorchrunHost

PARAMS = {
    "w": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "count": torch.tensor(2**40 + 1),
    "mask": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
}

# Each rank writes what it saw. Rank 1 sends after rank 0, with other values, and in the last round
# an empty model.
SESSION_SCRIPT = """
import json, os, sys
import torch
import torch.distributed as dist
import fedpool.client as flare

dist.init_process_group("gloo")
rank = dist.get_rank()
flare.init(rank=rank)
seen = {"rounds": []}
try:
    flare.get_site_name()
except RuntimeError as error:
    seen["early"] = str(error)
while "send" not in seen and flare.is_running():
    model = flare.receive()
    again = flare.receive() is model
    params = {name: [str(value.dtype), value.tolist()] for name, value in model.params.items()}
    seen["system"] = flare.system_info()
    seen["rounds"].append([flare.get_site_name(), flare.get_job_id(), flare.get_config(), flare.get_task_name(),
                           model.current_round, model.total_rounds, again, params])
    flare.log("loss", 0.5 + rank)
    try:
        if rank == 0:
            flare.send(flare.FLModel(params={"w": torch.zeros(2)}, metrics={"accuracy": 0.5}))
            dist.barrier()
        else:
            dist.barrier()
            flare.send(flare.FLModel(params={"w": torch.ones(2)}) if model.current_round == 0 else flare.FLModel())
    except RuntimeError as error:
        seen["send"] = str(error)
    with open(os.path.join(sys.argv[1], f"rank-{rank}.json"), "w") as file:
        json.dump(seen, file)
dist.destroy_process_group()
"""

STANDALONE_SCRIPT = """
import torch
import torch.distributed as dist
import fedpool.client as flare

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = torch.nn.Linear(2, 1)
flare.init()
rounds = 0
while flare.is_running():
    input_model = flare.receive()
    model.load_state_dict(input_model.params)
    model(torch.ones(1, 2)).sum().backward()  # of processes that had trained some were aborted as they ended
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    flare.send(flare.FLModel(params=model.state_dict(), metrics={"accuracy": 0.5}))
    rounds += 1
print(f"rank {dist.get_rank()} ran {rounds} round with {len(input_model.params)} params\\n", end="", flush=True)
dist.destroy_process_group()
"""

# Three ways to write the loop. Each prints what a rank trained on, and sends the sum over ranks.
_LOOP_BEGIN = """
import torch
import torch.distributed as dist
import fedpool.client as flare

dist.init_process_group("gloo")
rank = dist.get_rank()
flare.init(rank=rank)

def from_rank_0(value):
    values = [value if rank == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]

def train(round, params):
    total = params["w"] + rank + round
    dist.all_reduce(total)
    print(f"rank {rank} round {round} {params['w'].tolist()}\\n", end="", flush=True)
    return {"w": total}
"""
RANK_0_ASKS = (
    _LOOP_BEGIN
    + """
while True:
    if not from_rank_0(flare.is_running() if rank == 0 else None):
        break
    model = flare.receive()  # on every rank
    params = train(model.current_round, model.params)
    if rank == 0:
        flare.send(flare.FLModel(params=params))
dist.destroy_process_group()
"""
)
RANK_0_RECEIVES = (
    _LOOP_BEGIN
    + """
while flare.is_running():  # on every rank
    model = flare.receive() if rank == 0 else None
    params = train(*from_rank_0((model.current_round, model.params) if rank == 0 else None))
    if rank == 0:
        flare.send(flare.FLModel(params=params))
dist.destroy_process_group()
"""
)
RANK_0_DOES_ALL = (
    _LOOP_BEGIN
    + """
while from_rank_0(flare.is_running() if rank == 0 else None):
    model = flare.receive() if rank == 0 else None
    params = train(*from_rank_0((model.current_round, model.params) if rank == 0 else None))
    if rank == 0:
        flare.send(flare.FLModel(params=params))
    flare.log("loss", 1.0)
dist.destroy_process_group()
"""
)
RANK_0_LEAVES = (
    _LOOP_BEGIN
    + """
while flare.is_running():
    flare.receive()
    if rank == 0:
        break
    flare.send(flare.FLModel(params={}))
"""
)

UNINITIALISED_SCRIPT = "import fedpool.client as flare\nflare.init()\nflare.is_running()\n"


class SessionThread(threading.Thread):
    """The host's end of a session: welcomes one script, hands out assignments in order, and keeps
    the script's messages.
    """

    def __init__(self, address: str, key: bytes, assignments: list[Assignment]) -> None:
        super().__init__(daemon=True)
        self.messages: list[dict[str, Any]] = []
        self._assignments = assignments
        self._listener = Listener(address, family="AF_UNIX", authkey=key)

    def run(self) -> None:
        with self._listener, self._listener.accept() as connection:
            link = Link(connection)
            while True:
                try:
                    message = link.get()
                except EOFError:
                    return
                self.messages.append(message)
                if message["kind"] == "hello":
                    link.put("welcome", **asdict(Welcome("job-1", "site-7", {"lr": 0.1}, 6, 9)))
                elif message["kind"] == "next" and self._assignments:
                    link.put("assignment", assignment=asdict(self._assignments.pop(0)))
                elif message["kind"] == "next":
                    link.put("end")


def torchrun(
    folder: Path, script: str, *arguments: str, num_ranks: int = 2, **variables: str
) -> subprocess.CompletedProcess[str]:
    path = folder / "client.py"
    path.write_text(script)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDPOOL_")}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={num_ranks}",
            str(path),
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", **variables},
        timeout=400,
    )


def run_session(
    folder: Path, script: str, assignments: list[Assignment], *, num_ranks: int = 2
) -> tuple[SessionThread, subprocess.CompletedProcess[str]]:
    """Run a script on several ranks of a site with these assignments; it gets the folder as
    argument.
    """
    with tempfile.TemporaryDirectory(prefix="fp-") as short:  # the path of a Unix socket is limited to about 100 bytes
        host = SessionThread(f"{short}/s", b"secret", assignments)
        host.start()
        variables = {ADDRESS_VARIABLE: f"{short}/s", KEY_VARIABLE: b"secret".hex()}
        ran = torchrun(folder, script, str(folder), num_ranks=num_ranks, **variables)
        host.join(120)
    return host, ran


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SessionThread, subprocess.CompletedProcess[str]]:
    """A job of two rounds at a site whose script runs on two ranks."""
    folder = tmp_path_factory.mktemp("session")
    with (folder / "global").open("wb") as file:
        save_and_hash(file, PARAMS)
    assignments = [Assignment(n, 2, model=str(folder / "global"), update=str(folder / f"update-{n}")) for n in range(2)]
    return folder, *run_session(folder, SESSION_SCRIPT, assignments)


@pytest.fixture
def seen(session: tuple[Path, SessionThread, subprocess.CompletedProcess[str]]) -> list[dict[str, Any]]:
    """What each rank saw."""
    folder, _, _ = session
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_every_rank_sees_the_same_site_assignment_and_params(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["rounds"] == seen[1]["rounds"]
    site, job, config, task, number, total, again, params = seen[0]["rounds"][0]
    assert (site, job, config, task, number, total, again) == ("site-7", "job-1", {"lr": 0.1}, "train", 0, 2, True)
    assert params == {name: [str(value.dtype), value.tolist()] for name, value in PARAMS.items()}


def test_every_rank_knows_which_of_how_many_sites_it_is(seen: list[dict[str, Any]]) -> None:
    who = {"job_id": "job-1", "site_name": "site-7", "site_index": 6, "num_sites": 9}
    assert [rank["system"] for rank in seen] == [who, who]


def test_a_rank_above_0_learns_who_it_is_in_the_first_is_running(seen: list[dict[str, Any]]) -> None:
    assert "early" not in seen[0]
    assert "ranks above 0 learn site, job and config in their first flare.is_running()" in seen[1]["early"]


def test_only_rank_0_talks_to_the_host(session: tuple[Path, SessionThread, Any], seen: list[dict[str, Any]]) -> None:
    _, host, _ = session
    assert len(seen[1]["rounds"]) == 2
    kinds = [message["kind"] for message in host.messages]
    assert kinds == ["hello", *["next", "log", "update"] * 2, "next"]
    assert {message["value"] for message in host.messages if message["kind"] == "log"} == {0.5}


def test_the_update_is_rank_0s_whatever_the_others_send(
    session: tuple[Path, SessionThread, Any], seen: list[dict[str, Any]]
) -> None:
    folder, _, _ = session
    assert seen[0]["rounds"]
    assert load_arrays(folder / "update-0", "torch")["w"].tolist() == [0.0, 0.0]


def test_a_send_above_rank_0_does_nothing_whatever_the_model_holds(
    session: tuple[Path, SessionThread, subprocess.CompletedProcess[str]], seen: list[dict[str, Any]]
) -> None:
    _, _, ran = session
    assert [rank.get("send") for rank in seen] == [None, None]
    assert [len(rank["rounds"]) for rank in seen] == [2, 2]
    assert ran.returncode == 0, ran.stderr


def test_it_is_enough_when_rank_0_sends(tmp_path: Path) -> None:
    with (tmp_path / "global").open("wb") as file:
        save_and_hash(file, PARAMS)
    assignments = [
        Assignment(n, 2, model=str(tmp_path / "global"), update=str(tmp_path / f"update-{n}")) for n in range(2)
    ]
    script = """
import torch
import torch.distributed as dist
import fedpool.client as flare

dist.init_process_group("gloo")
flare.init()
rounds = 0
while flare.is_running():
    model = flare.receive()
    rounds += 1
    if dist.get_rank() == 0:
        flare.send(flare.FLModel(params=model.params))
print(f"rank {dist.get_rank()} ran {rounds} rounds\\n", end="", flush=True)
dist.destroy_process_group()
"""
    host, ran = run_session(tmp_path, script, assignments)
    assert ran.returncode == 0, ran.stderr
    assert sorted(ran.stdout.splitlines()) == ["rank 0 ran 2 rounds", "rank 1 ran 2 rounds"]
    assert [message["kind"] for message in host.messages] == ["hello", *["next", "update"] * 2, "next"]


@pytest.mark.parametrize("script", [RANK_0_ASKS, RANK_0_RECEIVES, RANK_0_DOES_ALL])
def test_a_loop_works_whichever_calls_are_left_to_rank_0(script: str, tmp_path: Path) -> None:
    assignments = []
    for number in range(3):
        with (tmp_path / f"global-{number}").open("wb") as file:
            save_and_hash(file, {"w": torch.full((2,), 10.0 * number)})
        model, update = str(tmp_path / f"global-{number}"), str(tmp_path / f"update-{number}")
        assignments.append(Assignment(number, 3, model=model, update=update, seed=number))
    _, ran = run_session(tmp_path, script, assignments)
    assert ran.returncode == 0, ran.stderr
    assert sorted(line for line in ran.stdout.splitlines() if line.startswith("rank")) == [
        f"rank {rank} round {number} {[10.0 * number] * 2}" for rank in range(2) for number in range(3)
    ]
    for number in range(3):
        assert load_arrays(tmp_path / f"update-{number}", "torch")["w"].tolist() == [22.0 * number + 1] * 2
    assert "once more" not in ran.stderr


def test_a_rank_that_waits_for_rank_0_when_that_has_ended_says_so(tmp_path: Path) -> None:
    _, ran = run_session(tmp_path, RANK_0_LEAVES, [Assignment(0, 1, update=str(tmp_path / "update"))])
    assert ran.returncode != 0
    assert (
        "ClientError: rank 1 is waiting in flare.is_running() or flare.receive() for rank 0, which is gone"
        in ran.stderr
    )
    assert "calling flare.is_running() on every rank" in ran.stderr


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    return torchrun(tmp_path_factory.mktemp("standalone"), STANDALONE_SCRIPT)


def test_standalone_only_rank_0_prints_what_was_sent(standalone: subprocess.CompletedProcess[str]) -> None:
    assert standalone.returncode == 0, standalone.stderr
    assert standalone.stdout.count("fedpool: no host found") == 1
    assert standalone.stdout.count("fedpool: sent 2 parameters, accuracy = 0.5") == 1


def test_standalone_every_rank_runs_one_round_on_its_own_weights(standalone: subprocess.CompletedProcess[str]) -> None:
    for rank in range(2):
        assert f"rank {rank} ran 1 round with 0 params\n" in standalone.stdout


def test_without_a_process_group_every_rank_is_told_to_make_one(tmp_path: Path) -> None:
    ran = torchrun(tmp_path, UNINITIALISED_SCRIPT)
    assert ran.returncode != 0
    assert (
        "ClientError: under torchrun, call torch.distributed.init_process_group() before the first flare.is_running()"
        in ran.stderr
    )


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group with only this process."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class OneRound:
    """An in-memory host with one assignment; a timeout expires at once."""

    welcome = Welcome("job-1", "site-1")

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.sent: list[str] = []

    def next(self, timeout: float | None) -> Assignment | None:
        if timeout is not None:
            raise Waiting
        return self.assignment

    def params(self, assignment: Assignment, params_format: ParamsFormat) -> dict[str, Any]:
        assert assignment.model is not None
        return load_arrays(assignment.model, params_format)

    def put(self, kind: str, **fields: Any) -> None:
        self.sent.append(kind)

    def note(self, text: str) -> None:
        self.sent.append("note")

    def close(self) -> None:
        self.sent.append("bye")


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("params_format", ["torch", "numpy"])
def test_params_of_every_dtype_are_broadcast_unchanged_in_either_format(
    params_format: ParamsFormat, tmp_path: Path
) -> None:
    with (tmp_path / "global").open("wb") as file:
        save_and_hash(file, PARAMS)
    host = TorchrunHost(0, OneRound(Assignment(0, 1, model=str(tmp_path / "global"))))
    assignment = host.next(None)
    assert assignment is not None
    params = host.params(assignment, params_format)
    assert {type(value) for value in params.values()} == {torch.Tensor if params_format == "torch" else np.ndarray}
    assert params["half"].dtype == (torch.bfloat16 if params_format == "torch" else ml_dtypes.bfloat16)
    assert {name: bytes(as_bytes(value)) for name, value in params.items()} == {
        name: bytes(as_bytes(value)) for name, value in PARAMS.items()
    }


@pytest.mark.usefixtures("group_of_one")
def test_a_time_out_of_rank_0_is_one_of_all_ranks() -> None:
    host = TorchrunHost(0, OneRound(Assignment(3, 5, exclude=("^head",), seed=2**62)))
    with pytest.raises(Waiting):
        host.next(1.0)
    assert host.next(None) == Assignment(3, 5, exclude=("^head",), seed=2**62)


@pytest.mark.usefixtures("group_of_one")
def test_a_client_joins_ranks_that_were_started_after_it_once() -> None:
    client = Client(OneRound(Assignment(0, 1)))
    client.join_ranks(0)
    client.join_ranks(0)
    assert client.is_running()
    assert client.site_name == "site-1"


def test_messages_and_goodbyes_are_rank_0s_alone() -> None:
    real = OneRound(Assignment(0, 1))
    for host in (TorchrunHost(0, real), TorchrunHost(1, None)):
        host.put("log", key="loss", value=0.5, where={})
        host.close()
    assert real.sent == ["log", "bye"]
