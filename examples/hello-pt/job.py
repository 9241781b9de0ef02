"""Federated averaging over three sites, simulated on this machine."""

from pathlib import Path

import torch
from model import SimpleNetwork

from fedpool import FedAvgRecipe, SimEnv

torch.manual_seed(0)  # the initial weights, so that every run of this file gives the same bits
recipe = FedAvgRecipe(
    name="hello-pt",
    min_clients=3,
    num_rounds=5,
    model=SimpleNetwork(),
    train_script=Path(__file__).parent / "client.py",
    train_args="--batch_size 32 --epochs 2",
)
run = recipe.execute(env=SimEnv(num_clients=3, num_threads=3))
result = run.get_result()
print(f"accuracy of the final model: {result.metrics[-1]['accuracy']:.4f}")
