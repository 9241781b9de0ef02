"""The cost of a round's scalars: compares jobs that log nothing with jobs that log and are tracked.

    python benchmarks/tracking.py [--scalars 1000] [--rounds 30] [--repeat 3] [--track tensorboard]

Two simulated sites log half of a round's scalars each, and train nothing, so a round's time is
fedpool's own. The table has the medians of all but a job's first three rounds, in milliseconds, and
their difference.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from prefect.settings import temporary_settings

from fedpool import FedAvgRecipe, SimEnv
from fedpool.deployments.server import private_server

SCRIPT = """
import sys
import fedpool.client as flare
from fedpool.client.tracking import SummaryWriter

flare.init()
writer = SummaryWriter()
while flare.is_running():
    model = flare.receive()
    for step in range(int(sys.argv[1])):
        writer.add_scalar("loss", 1 / (1 + step), global_step=step)
    flare.send(flare.FLModel(params={name: value + 1 for name, value in model.params.items()}))
"""
SITES = 2
WARM_UP = 3


def round_ms(folder: Path, scalars: int, rounds: int, track: list[str]) -> list[float]:
    """Milliseconds of each round of a job, from its records; each site logs `scalars`."""
    (folder / "client.py").write_text(SCRIPT)
    recipe = FedAvgRecipe(
        name="scalars",
        min_clients=SITES,
        num_rounds=rounds,
        model={"w": np.zeros(8, np.float32)},
        train_script=folder / "client.py",
        train_args=str(scalars),
    )
    env = SimEnv(num_clients=SITES, num_threads=SITES, workspace=folder / "runs", progress=False, track=track)
    result = recipe.execute(env=env).get_result()
    return [1000 * record["timings"]["round_s"] for record in result.rounds[WARM_UP:]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="The cost of a round's scalars.")
    parser.add_argument("--scalars", type=int, default=1000, help="per round, from both sites together")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--track", nargs="*", default=["tensorboard"])
    arguments = parser.parse_args()
    cases: dict[str, tuple[int, list[str]]] = {
        "nothing logged": (0, []),
        f"{arguments.scalars:,} logged": (arguments.scalars // SITES, []),
        f"{arguments.scalars:,} logged and tracked": (arguments.scalars // SITES, arguments.track),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    with private_server() as server, tempfile.TemporaryDirectory() as folder:
        server.wait()
        with temporary_settings(server.access.settings()):
            for _ in range(arguments.repeat):
                for name, (scalars, track) in cases.items():
                    found[name] += round_ms(Path(folder), scalars, arguments.rounds, track)
    base = median(found["nothing logged"])
    for name, times in found.items():
        print(f"{name:26} {median(times):7.1f} ms per round, {median(times) - base:+6.1f} ms")


if __name__ == "__main__":
    main()
