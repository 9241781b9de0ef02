"""On a GPU: scripts that are forked, share a device, use mixed precision and join process groups.
Run with `make test-gpu`.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedpool.client.lightning as lightning_client
from fedpool import FedAvgRecipe, FedNovaRecipe, FedProxRecipe, Recipe, RecipeError, Run, ScaffoldRecipe, SimEnv
from fedpool.arrays import load_arrays
from fedpool.errors import ClientError
from fedpool.sites.devices import num_devices
from tests.client.test_huggingface import JOB_SCRIPT as HUGGINGFACE_SCRIPT
from tests.client.test_huggingface import new_model
from tests.client.test_lightning import JOB_SCRIPT as LIGHTNING_SCRIPT
from tests.client.test_torchrun import run_session
from tests.hosts import host_of

pytestmark = [
    pytest.mark.gpu,
    # Lightning's advice for a one-second training: more workers, fewer log lines.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    # Lightning and transformers call functions that torch has deprecated.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

DEVICE_FOR_ALL = {"gpus": "0", "num_threads": 2}


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device on this machine")


def new_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))


# The device, the dropout and an algorithm's additions are filled in. The update is sent from the
# device.
SCRIPT = """
    import torch
    import fedpool.client as flare

    device = torch.device("{device}")
    net = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(),
                              torch.nn.Dropout({dropout}), torch.nn.Linear(32, 1)).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    flare.init()
    site = int(flare.get_site_name().split("-")[1])
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(site)).to(device)
    targets = inputs.sum(1, keepdim=True)
    while flare.is_running():
        received = flare.receive()
        net.load_state_dict(received.params)
        net.eval()
        with torch.no_grad():
            score = -(net(inputs) - targets).square().mean()
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics={{"score": score}}))
            continue
        net.train()
        {begin}
        for x, y in zip(inputs.split(16), targets.split(16)):
            optimizer.zero_grad()
            ((net(x) - y).square().mean() + {term}).backward()
            optimizer.step()
        flare.send(flare.FLModel(params=net.state_dict(), metrics={{"score": score}}, {beside}))
"""
PLAIN = {"begin": "", "term": "0", "beside": 'meta={"NUM_STEPS_CURRENT_ROUND": 4}'}
ALGORITHMS: dict[type[Recipe], dict[str, str]] = {
    FedAvgRecipe: {},
    FedProxRecipe: {"term": 'flare.prox_loss(net, received.params, flare.get_config()["fedprox_mu"])'},
    FedNovaRecipe: {
        "begin": "steps = flare.LocalSteps(optimizer)",
        "beside": 'meta={"LOCAL_STEPS": steps.close(), "NUM_STEPS_CURRENT_ROUND": 4}',
    },
    ScaffoldRecipe: {"begin": "control = flare.Scaffold(net, optimizer)", "beside": "extras=control.extras()"},
}


def script(device: str, dropout: float, kind: type[Recipe] = FedAvgRecipe) -> str:
    return SCRIPT.format(**PLAIN | ALGORITHMS[kind], device=device, dropout=dropout)


def on_gpu(script: str, cpu: str, gpu: str) -> str:
    """A script from the CPU tests, with the arguments of its trainer replaced."""
    assert cpu in script
    return script.replace(cpu, gpu)


def same_bits(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class TestJobs:
    """Whole simulated jobs, with the scripts on one GPU."""

    def test_sites_share_a_device_and_the_same_seed_gives_the_same_bits(self, run_job: Callable[..., Run]) -> None:
        job = {"model": new_net(), "num_rounds": 3, "key_metric": "score", "min_clients": 4}
        env = {"num_clients": 4, **DEVICE_FOR_ALL}
        first, again, alone, fresh = (
            run_job(script("cuda", dropout=0.2), env=env | options, **job).get_result()
            for options in ({}, {}, {"num_threads": 1}, {"keep_alive": False})
        )
        assert same_bits(first.params, again.params)
        assert same_bits(first.params, alone.params)
        assert same_bits(first.params, fresh.params)
        scores = [metrics["score"] for metrics in first.metrics]
        assert scores[-1] > scores[0]

    @pytest.mark.parametrize("transfer", ["FULL", "DIFF"])
    @pytest.mark.parametrize("kind", ALGORITHMS)
    def test_an_algorithm_comes_to_what_it_does_without_a_gpu(
        self, run_job: Callable[..., Run], kind: type[Recipe], transfer: str
    ) -> None:
        job = {"model": new_net(), "kind": kind, "params_transfer_type": transfer, "key_metric": "score"}
        if kind is FedProxRecipe:
            job["fedprox_mu"] = 0.5
        here = run_job(script("cuda", 0, kind), env=DEVICE_FOR_ALL, **job).get_result()
        there = run_job(script("cpu", 0, kind), **job).get_result()
        assert here.params.keys() == there.params.keys()
        for name, value in here.params.items():
            assert torch.allclose(value, there.params[name], rtol=1e-3, atol=1e-4), name

    def test_a_device_that_is_not_there_is_refused_when_the_environment_is_built(self) -> None:
        assert num_devices() == torch.cuda.device_count()
        SimEnv(gpus=",".join(str(number) for number in range(num_devices())))
        with pytest.raises(RecipeError, match="names device 99, but this machine has"):
            SimEnv(gpus="0,99")

    def test_asking_for_devices_does_not_initialise_cuda(self) -> None:
        code = "import torch; from fedpool import SimEnv; SimEnv(gpus='0'); assert not torch.cuda.is_initialized()"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestTrainers:
    """Trainers that own their loop, at each precision that is used on GPUs."""

    @pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
    def test_lightning_learns_and_the_same_seed_gives_the_same_bits(
        self, run_job: Callable[..., Run], precision: str
    ) -> None:
        net = nn.Module()
        net.layer = nn.Linear(3, 1)
        job = {"env": DEVICE_FOR_ALL, "model": net, "num_rounds": 3, "key_metric": "val_loss", "key_metric_mode": "min"}
        script = on_gpu(
            LIGHTNING_SCRIPT.format(package="pytorch_lightning"),
            'accelerator="cpu"',
            f'accelerator="gpu", devices=1, precision="{precision}"',
        )
        first, again = (run_job(script, **job).get_result() for _ in range(2))
        assert same_bits(first.params, again.params)
        losses = [metrics["val_loss"] for metrics in first.metrics]
        assert losses[-1] < losses[0] / 2

    @pytest.mark.parametrize("precision", ["", "fp16=True,", "bf16=True,"])
    def test_transformers_learn(self, run_job: Callable[..., Run], precision: str) -> None:
        job = {"model": new_model(), "num_rounds": 2, "key_metric": "eval_loss", "key_metric_mode": "min"}
        script = on_gpu(HUGGINGFACE_SCRIPT, "use_cpu=True,", precision)
        result = run_job(script, env=DEVICE_FOR_ALL, **job).get_result()
        losses = [metrics["eval_loss"] for metrics in result.metrics]
        assert losses[-1] < losses[0]

    def test_fsdp_is_refused(self, tmp_path: Path) -> None:
        package = importlib.import_module("pytorch_lightning")
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = package.Trainer(accelerator="gpu", devices=1, strategy="fsdp", default_root_dir=tmp_path, **quiet)
        with pytest.raises(ClientError, match=r"(?i)fsdp"):
            lightning_client.patch(trainer)


# NCCL allows one process per device, so two ranks that share a device use only what fedpool creates
# beside the NCCL group.
RANKS_SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
import fedpool.client as flare

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.cuda.set_device(rank % torch.cuda.device_count())
dist.init_process_group("nccl")
net = torch.nn.Linear(3, 1).cuda()
together = torch.nn.parallel.DistributedDataParallel(net) if world <= torch.cuda.device_count() else net
flare.init()
while flare.is_running():
    net.load_state_dict(flare.receive().params)
    net.zero_grad()
    together(torch.ones(4, 3, device="cuda")).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.5).step()
    save_file(net.state_dict(), f"{sys.argv[1]}/rank-{rank}")
    flare.send(flare.FLModel(params=net.state_dict(), meta={"NUM_STEPS_CURRENT_ROUND": 1}))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_script_with_a_group_on_nccl_is_a_client(tmp_path: Path, num_ranks: int) -> None:
    model = {"weight": np.zeros((1, 3), np.float32), "bias": np.ones(1, np.float32)}
    plan = [a for a in host_of(tmp_path, model).plan if a is not None]
    _, ran = run_session(tmp_path, RANKS_SCRIPT, plan, num_ranks=num_ranks)
    assert ran.returncode == 0, ran.stderr
    ranks = [load_arrays(tmp_path / f"rank-{rank}", "torch") for rank in range(num_ranks)]
    sent = load_arrays(tmp_path / "update-0", "torch")
    assert all(same_bits(rank, sent) for rank in ranks)
    assert sent["weight"].tolist() == [[-2.0] * 3]  # 4 examples of gradient 1, lr .5
    assert sent["bias"].tolist() == [-1.0]
