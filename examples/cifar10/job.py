"""Federated averaging of a CIFAR-10 classifier. `--synthetic` needs neither the data nor
torchvision.
"""

import argparse
from pathlib import Path

import torch
from model import Net

from fedpool import FedAvgRecipe, SimEnv

parser = argparse.ArgumentParser()
parser.add_argument("--synthetic", action="store_true", help="generated images instead of CIFAR-10")
parser.add_argument("--num_sites", type=int, default=4)
parser.add_argument("--num_rounds", type=int, default=3)
args = parser.parse_args()

torch.manual_seed(0)
recipe = FedAvgRecipe(
    name="cifar10",
    min_clients=args.num_sites,
    num_rounds=args.num_rounds,
    model=Net(),
    train_script=Path(__file__).parent / "client.py",
    train_args=f"--num_sites {args.num_sites}" + (" --synthetic" if args.synthetic else ""),
)
run = recipe.execute(env=SimEnv(num_clients=args.num_sites))
print(f"accuracy of the final model: {run.get_result().metrics[-1]['accuracy']:.4f}")
