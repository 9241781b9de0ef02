"""A client script that finds no host: `python client.py` runs one round on the script's own
initial weights.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TORCH_SCRIPT = """
import sys
import torch
import fedpool.client as flare

model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
before = {name: value.clone() for name, value in model.state_dict().items()}
flare.init()
rounds = 0
while flare.is_running():
    input_model = flare.receive()
    print("params", dict(input_model.params), "round", input_model.current_round, "of", input_model.total_rounds)
    print("loaded", model.load_state_dict(input_model.params))
    print("same weights", all(torch.equal(value, before[name]) for name, value in model.state_dict().items()))
    print("part loaded", model[0].load_state_dict(input_model.params, strict=True))
    flare.log("loss", torch.tensor(0.25), global_step=3)
    flare.send(flare.FLModel(params=model.cpu().state_dict(), metrics={"accuracy": 0.5}, meta={"NUM_STEPS_CURRENT_ROUND": 3}))
    rounds += 1
print("rounds", rounds)
for name, state in {"empty": {}, "other": {"x": torch.ones(1)}}.items():
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        print(name, "fails:", "Missing key" in str(error))
print("own state loads", model.load_state_dict(before))
from fedpool.client.hosts import Standalone
wrapped = torch.nn.Module.load_state_dict
host = Standalone()
print("wrapped once", host.params(host.next(None), "torch") == {}, torch.nn.Module.load_state_dict is wrapped)
print("args", sys.argv[1:])
"""

NUMPY_SCRIPT = """
import sys
import numpy as np
import fedpool.client as flare
from fedpool.client.tracking import SummaryWriter

flare.init()
writer = SummaryWriter()
weights = {"w": np.zeros(3)}
while flare.is_running():
    input_model = flare.receive()
    weights.update(input_model.params)
    writer.add_scalar("loss", np.float32(0.5), global_step=1)
    writer.add_scalars("val", {"a": 1, "b": 2.5})
    flare.send(flare.FLModel(params={name: value + 1 for name, value in weights.items()}))
print("torch" in sys.modules)
"""


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = folder / "client.py"
    path.write_text(script)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("FEDPOOL_", "RANK", "WORLD_SIZE"))
    }
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=400,
    )


@pytest.fixture(scope="module")
def torch_run(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    return run(tmp_path_factory.mktemp("torch"), TORCH_SCRIPT, "--lr", "0.1")


@pytest.fixture(scope="module")
def numpy_run(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    return run(tmp_path_factory.mktemp("numpy"), NUMPY_SCRIPT)


def test_a_torch_script_runs_to_its_end_without_complaint(torch_run: subprocess.CompletedProcess[str]) -> None:
    assert (torch_run.returncode, torch_run.stderr) == (0, "")


def test_it_says_first_that_it_runs_standalone(torch_run: subprocess.CompletedProcess[str]) -> None:
    assert torch_run.stdout.splitlines()[0] == (
        "fedpool: no host found, running standalone: one round on this script's own initial weights"
    )


def test_it_runs_exactly_one_round_and_receives_empty_params(torch_run: subprocess.CompletedProcess[str]) -> None:
    assert "params {} round 0 of 1\n" in torch_run.stdout
    assert "rounds 1\n" in torch_run.stdout


def test_a_strict_load_of_the_received_params_leaves_the_weights_as_they_were(
    torch_run: subprocess.CompletedProcess[str],
) -> None:
    assert "\nloaded <All keys matched successfully>\nsame weights True\n" in torch_run.stdout
    assert "\npart loaded <All keys matched successfully>\n" in torch_run.stdout


def test_a_strict_load_of_any_other_dict_works_and_fails_as_ever(torch_run: subprocess.CompletedProcess[str]) -> None:
    assert (
        "\nempty fails: True\nother fails: True\nown state loads <All keys matched successfully>\n" in torch_run.stdout
    )


def test_the_method_that_lets_them_load_is_wrapped_only_once(torch_run: subprocess.CompletedProcess[str]) -> None:
    assert "\nwrapped once True True\n" in torch_run.stdout


def test_send_prints_the_metrics_and_what_was_sent(torch_run: subprocess.CompletedProcess[str]) -> None:
    assert "fedpool: sent 7 parameters, accuracy = 0.5, meta {'NUM_STEPS_CURRENT_ROUND': 3}\n" in torch_run.stdout


def test_log_prints_the_scalar(torch_run: subprocess.CompletedProcess[str]) -> None:
    assert "fedpool: log loss = 0.25\n" in torch_run.stdout


def test_the_scripts_own_arguments_reach_it(torch_run: subprocess.CompletedProcess[str]) -> None:
    assert torch_run.stdout.endswith("args ['--lr', '0.1']\n")


def test_a_numpy_script_runs_to_its_end_and_never_loads_torch(numpy_run: subprocess.CompletedProcess[str]) -> None:
    assert (numpy_run.returncode, numpy_run.stderr) == (0, "")
    assert numpy_run.stdout.splitlines()[-1] == "False"


def test_a_numpy_script_sends_its_own_weights_and_says_when_there_are_no_metrics(
    numpy_run: subprocess.CompletedProcess[str],
) -> None:
    assert "fedpool: sent 1 parameters, no metrics, meta {}\n" in numpy_run.stdout


def test_a_summary_writer_logs_each_scalar_under_its_tag(numpy_run: subprocess.CompletedProcess[str]) -> None:
    lines = [line for line in numpy_run.stdout.splitlines() if line.startswith("fedpool: log")]
    assert lines == ["fedpool: log loss = 0.5", "fedpool: log val/a = 1.0", "fedpool: log val/b = 2.5"]


def test_a_wrong_model_is_refused_standalone_too(tmp_path: Path) -> None:
    ran = run(
        tmp_path,
        "import fedpool.client as flare\nflare.init()\nflare.receive()\nflare.send(flare.FLModel(params={'w': [1.0]}))\n",
    )
    assert ran.returncode == 1
    assert "ClientError: params['w'] is a list: give a torch tensor or a numpy array" in ran.stderr


def test_a_standalone_run_leaves_no_file_behind(tmp_path: Path) -> None:
    assert run(tmp_path, NUMPY_SCRIPT).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["client.py"]
