"""Federated averaging of a LightningModule over three sites on this machine."""

from pathlib import Path

import torch
from model import Digits

from fedpool import FedAvgRecipe, SimEnv

torch.manual_seed(0)  # for the initial weights: every run of this file gives the same bits
recipe = FedAvgRecipe(
    name="hello-lightning",
    min_clients=3,
    num_rounds=5,
    model=Digits(),
    train_script=Path(__file__).parent / "client.py",
    train_args="--epochs 2",
)

if __name__ == "__main__":
    result = recipe.execute(env=SimEnv(num_clients=3)).get_result()
    print(f"accuracy of the final model: {result.metrics[-1]['accuracy']:.4f}")
