"""Engine: a fedpool job in `PocEnv`: a Prefect server, the coordinator's worker and a worker per
site.
"""

from pathlib import Path

from shared import WORKLOADS, job_arguments

from fedpool import FedAvgRecipe, PocEnv


def main() -> None:
    """Start the proof of concept, run the job, stop the proof of concept."""
    arguments = job_arguments()
    recipe = FedAvgRecipe(
        name="bench",
        min_clients=arguments.sites,
        num_rounds=arguments.rounds,
        model=WORKLOADS[arguments.workload].build_model(),
        train_script=str(Path(__file__).with_name("fedpool_client.py")),
        train_args=f"--workload {arguments.workload} --sites {arguments.sites}",
    )
    env = PocEnv(
        num_clients=arguments.sites,
        look_ahead=arguments.look_ahead,
        home=Path(arguments.workspace),
        progress=False,
    )
    try:
        env.up()
        print(recipe.execute(env).get_result())
    finally:
        env.down()


if __name__ == "__main__":
    main()
