"""Engine: a fedpool job in `SimEnv`."""

from pathlib import Path

from shared import WORKLOADS, job_arguments

from fedpool import FedAvgRecipe, SimEnv


def main() -> None:
    """Run the job."""
    arguments = job_arguments()
    recipe = FedAvgRecipe(
        name="bench",
        min_clients=arguments.sites,
        num_rounds=arguments.rounds,
        model=WORKLOADS[arguments.workload].build_model(),
        train_script=str(Path(__file__).with_name("fedpool_client.py")),
        train_args=f"--workload {arguments.workload} --sites {arguments.sites}",
    )
    env = SimEnv(
        num_clients=arguments.sites,
        num_threads=arguments.threads,
        workspace=arguments.workspace,
        keep_alive=not arguments.cold_sites,
    )
    print(recipe.execute(env=env).get_result())


if __name__ == "__main__":  # the sessions' processes may import this module again
    main()
