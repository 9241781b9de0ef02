"""The shared code of the engines' scripts: arguments, workloads, and the stamps that give round
times.
"""

import argparse
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import digits
import large
import sleeping
import torch

WORKLOADS: dict[str, ModuleType] = {"digits": digits, "large": large, "sleep": sleeping}
STAMPS = "BENCH_STAMPS"
"""Environment variable with the stamps' file. Not FEDPOOL_..., which `PocEnv` hides from its
sites.
"""


def job_arguments() -> argparse.Namespace:
    """The arguments that simulation.py and poc.py pass to an engine."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--sites", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True, help="sites that train at the same time")
    parser.add_argument("--workspace", required=True, help="an empty folder for the engine's files")
    parser.add_argument("--cold-sites", action="store_true", help="keep no site alive between rounds")
    parser.add_argument(
        "--look-ahead", type=int, default=2, help="rounds that fedpool announces ahead, in a proof of concept"
    )
    return parser.parse_args()


def stamp(site: int, received_at: float, score: float) -> None:
    """Note when a site received a round's model, and how the model scored there.

    Sites do this, not the server, because it is the one moment that every engine shows to user
    code.
    """
    with Path(os.environ[STAMPS]).open("a", encoding="utf-8") as file:
        file.write(f"{site} {received_at} {score}\n")  # one short write, so lines of several processes don't mix


def serve(flare: Any) -> None:
    """The client script of the engines with this client API: fedpool and NVFlare run the same
    lines.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--sites", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workload = WORKLOADS[arguments.workload]
    model = workload.build_model()
    flare.init()
    site = int(flare.get_site_name().removeprefix("site-")) - 1
    while flare.is_running():
        received = flare.receive()
        received_at = time.time()
        model.load_state_dict(received.params)
        score = workload.evaluate(model)
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics={"accuracy": score}))
            continue
        stamp(site, received_at, score)
        num_steps = workload.train(model, site=site, num_sites=arguments.sites, round_number=received.current_round)
        flare.send(
            flare.FLModel(
                params=model.state_dict(), metrics={"accuracy": score}, meta={"NUM_STEPS_CURRENT_ROUND": num_steps}
            )
        )
