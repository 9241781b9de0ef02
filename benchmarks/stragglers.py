"""Run a job with one slow site under several rules, and print how long 10 rounds take with each.

Training is a sleep, so that sites don't compete for the processors: .3 s, and ten times as long at
the slow site.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from prefect.settings import temporary_settings

from fedpool import FedAvgRecipe, SimEnv
from fedpool.deployments.server import private_server

TRAINING_S = 0.3
SLOW = 10
SCRIPT = """
import sys
import time

import fedpool.client as flare

flare.init()
slow_s, quick_s = map(float, sys.argv[1:])
while flare.is_running():
    model = flare.receive()
    time.sleep(slow_s if flare.get_site_name() == "site-4" else quick_s)
    flare.send(flare.FLModel(params={name: value + 1 for name, value in model.params.items()}))
"""
RULES: Mapping[str, Mapping[str, Any]] = {
    "no slow site": {"min_clients": 4},
    "wait for all": {"min_clients": 4},
    "grace of 50 %": {"min_clients": 3, "quorum_grace": 0.5},
    "no grace": {"min_clients": 3, "quorum_grace": 0.0},
    "over-sampling, 3 of 4": {"min_clients": 3, "clients_per_round": 3, "over_sample": 1},
    "hung site, grace of 50 %": {"min_clients": 3, "quorum_grace": 0.5},
}


def main() -> None:
    """Run every rule in turn, `--repeat` times, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {rule: [] for rule in RULES}
    late: dict[str, int] = {}
    with private_server() as server:
        server.wait()
        with temporary_settings(server.access.settings()):
            for _ in range(arguments.repeat):
                for rule in RULES:
                    print(f"{rule} ...", file=sys.stderr)
                    took, late[rule] = run(rule, arguments.rounds)
                    seconds[rule].append(took)
    print(f"| rule | s for {arguments.rounds} rounds | x | rounds without site-4 |")
    print("|---|---:|---:|---:|")
    least = median(seconds["no slow site"])
    for rule, took_s in seconds.items():
        print(f"| {rule} | {median(took_s):.1f} | {median(took_s) / least:.1f} | {late[rule]} |")


def run(rule: str, num_rounds: int) -> tuple[float, int]:
    """Seconds from the start of the first round to the end of the last, and the number of rounds
    that closed without the slow site.
    """
    slow_s = {"no slow site": TRAINING_S, "hung site, grace of 50 %": 1e6}.get(rule, SLOW * TRAINING_S)
    with tempfile.TemporaryDirectory(prefix="fedpool-stragglers-") as folder:
        script = Path(folder) / "client.py"
        script.write_text(SCRIPT, encoding="utf-8")
        recipe = FedAvgRecipe(
            name="stragglers",
            num_rounds=num_rounds,
            model={"w": np.zeros(10, np.float32)},
            train_script=script,
            train_args=[str(slow_s), str(TRAINING_S)],
            **RULES[rule],
        )
        began = time.monotonic()
        env = SimEnv(num_clients=4, num_threads=4, workspace=Path(folder) / "runs", progress=False)
        result = recipe.execute(env).get_result()
        whole_s = time.monotonic() - began
        rounds_s = sum(record["timings"]["round_s"] for record in result.rounds)
        assert rounds_s <= whole_s
        without = sum("site-4" not in [entry["site"] for entry in record["accepted"]] for record in result.rounds)
        return rounds_s, without


if __name__ == "__main__":
    main()
