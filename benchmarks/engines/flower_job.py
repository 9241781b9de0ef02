"""Engine: a Flower app in its Ray simulation, with one Ray actor per site that may train at
once.
"""

from flower_apps import build_client, build_server
from flwr.simulation import run_simulation
from shared import job_arguments


def main() -> None:
    """Run the job."""
    arguments = job_arguments()
    run_simulation(
        server_app=build_server(arguments.workload, arguments.sites, arguments.rounds),
        client_app=build_client(arguments.workload, arguments.sites),
        num_supernodes=arguments.sites,
        backend_config={
            "init_args": {"num_cpus": arguments.threads, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main()
