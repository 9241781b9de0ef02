"""Engine: an NVFlare job in its `PocEnv`: a server, and for every site a client and a job
process.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run the job, which starts the proof of concept, then stop it."""
    from shared import WORKLOADS, job_arguments

    arguments = job_arguments()
    workspace = Path(arguments.workspace)
    workspace.mkdir()
    # NVFlare runs `python3` and keeps a configuration in the home folder; its sites import the
    # script's modules from here.
    os.environ |= {
        "HOME": str(workspace),
        "NVFLARE_POC_WORKSPACE": str(workspace / "poc"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(HERE),
    }
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe import PocEnv

    recipe = FedAvgRecipe(
        name="bench",
        min_clients=arguments.sites,
        num_rounds=arguments.rounds,
        model=WORKLOADS[arguments.workload].build_model(),
        train_script=str(HERE / "nvflare_client.py"),
        train_args=f"--workload {arguments.workload} --sites {arguments.sites}",
    )
    env = PocEnv(num_clients=arguments.sites)
    try:
        print(recipe.execute(env).get_result())
    finally:
        env.stop(clean_up=True)


if __name__ == "__main__":
    main()
