"""Every algorithm on three sites on this machine: `python job.py`; just one: `python job.py
scaffold`.
"""

import sys
from pathlib import Path

import torch
from digits import NUM_SITES, Network

from fedpool import (
    CyclicRecipe,
    DiLoCoRecipe,
    DittoRecipe,
    FedAvgRecipe,
    FedBNRecipe,
    FedNovaRecipe,
    FedOptRecipe,
    FedProxRecipe,
    ScaffoldRecipe,
    SimEnv,
)

HERE = Path(__file__).parent
# name -> recipe, client script, the algorithm's own parameters
ALGORITHMS = {
    "fedavg": (FedAvgRecipe, "plain.py", {}),
    "median": (FedAvgRecipe, "plain.py", {"aggregator": "median"}),
    "fedprox": (FedProxRecipe, "fedprox.py", {"fedprox_mu": 0.1}),
    "fedadam": (FedOptRecipe, "plain.py", {"server_optimizer": "adam", "server_lr": 0.02}),
    "scaffold": (ScaffoldRecipe, "scaffold.py", {}),
    "fednova": (FedNovaRecipe, "fednova.py", {}),
    "diloco": (DiLoCoRecipe, "plain.py", {}),
    "cyclic": (CyclicRecipe, "plain.py", {"order": "random"}),
    "ditto": (DittoRecipe, "ditto.py", {"ditto_lambda": 0.1}),
    "fedbn": (FedBNRecipe, "plain.py", {}),
}


def recipe(name: str, num_rounds: int = 3):
    """The recipe of one algorithm."""
    kind, script, parameters = ALGORITHMS[name]
    torch.manual_seed(0)  # for the initial weights: every run of this file gives the same bits
    if kind is not CyclicRecipe:  # where a round is one site's turn
        parameters = {"min_clients": NUM_SITES, **parameters}
    return kind(name=name, num_rounds=num_rounds, model=Network(), train_script=HERE / script, **parameters)


if __name__ == "__main__":
    for name in sys.argv[1:] or ALGORITHMS:
        result = recipe(name).execute(env=SimEnv(num_clients=NUM_SITES)).get_result()
        print(f"{name}: accuracy of the final model: {result.metrics[-1]['accuracy']:.4f}")
