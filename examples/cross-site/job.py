"""Federated averaging over three sites that each lack some of the digits; then every site scores
every model.
"""

from pathlib import Path

import torch
from torch import nn

from fedpool import FedAvgRecipe, SimEnv

torch.manual_seed(0)  # for the initial weights: every run of this file gives the same bits
recipe = FedAvgRecipe(
    name="cross-site",
    min_clients=3,
    num_rounds=5,
    model=nn.Linear(64, 10),
    train_script=Path(__file__).parent / "client.py",
    cross_site_eval=True,
)

if __name__ == "__main__":
    result = recipe.execute(env=SimEnv(num_clients=3)).get_result()
    for site, row in result.cross_site.items():
        scores = ", ".join(f"{owner} {metrics['accuracy']:.4f}" for owner, metrics in row.items())
        print(f"on the data of {site}: {scores}")
