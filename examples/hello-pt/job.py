"""Federated averaging over three sites on this machine."""

import sys
from pathlib import Path

import torch
from model import SimpleNetwork

from fedpool import FedAvgRecipe, PocEnv, SimEnv

torch.manual_seed(0)  # for the initial weights: every run of this file gives the same bits
recipe = FedAvgRecipe(
    name="hello-pt",
    min_clients=3,
    num_rounds=5,
    model=SimpleNetwork(),
    train_script=Path(__file__).parent / "client.py",
    train_args="--batch_size 32 --epochs 2",
)

if __name__ == "__main__":
    # The same recipe in a simulation, or, with `python job.py poc`, in a proof of concept with a
    # process per site.
    env = PocEnv(num_clients=3) if sys.argv[1:] == ["poc"] else SimEnv(num_clients=3, num_threads=3)
    result = recipe.execute(env=env).get_result()
    print(f"accuracy of the final model: {result.metrics[-1]['accuracy']:.4f}")
