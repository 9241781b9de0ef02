"""Engine: an NVFlare job in its `SimEnv`.

With as many threads as sites, NVFlare keeps one process per site over all rounds; with fewer, it
starts a process for every site in every round. simulation.py measures both.
"""

from pathlib import Path

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv
from shared import WORKLOADS, job_arguments


def main() -> None:
    """Run the job."""
    arguments = job_arguments()
    recipe = FedAvgRecipe(
        name="bench",
        min_clients=arguments.sites,
        num_rounds=arguments.rounds,
        model=WORKLOADS[arguments.workload].build_model(),
        train_script=str(Path(__file__).with_name("nvflare_client.py")),
        train_args=f"--workload {arguments.workload} --sites {arguments.sites}",
    )
    env = SimEnv(num_clients=arguments.sites, num_threads=arguments.threads, workspace_root=arguments.workspace)
    print(recipe.execute(env).get_result())


if __name__ == "__main__":
    main()
