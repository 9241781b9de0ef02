"""Engine: a Flower app in its Ray simulation, with one Ray actor for each site that may train at the same time."""

import time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from shared import WORKLOADS, job_arguments, stamp


def build_client(workload_name: str, num_sites: int) -> ClientApp:
    """The app that a site runs: score the model received, train it, return it."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        received_at = time.time()
        torch.set_num_threads(1)
        workload = WORKLOADS[workload_name]
        site = int(context.node_config["partition-id"])
        round_number = int(message.content["config"]["server-round"]) - 1
        model = workload.build_model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        score = workload.evaluate(model)
        stamp(site, received_at, score)
        num_steps = workload.train(model, site=site, num_sites=num_sites, round_number=round_number)
        records = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"accuracy": score, "num-steps": num_steps}),
        }
        return Message(content=RecordDict(records), reply_to=message)

    return app


def build_server(workload_name: str, num_sites: int, num_rounds: int) -> ServerApp:
    """The app that runs FedAvg over all sites, weighted by their steps."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_evaluate=0,
            min_train_nodes=num_sites,  # else it samples from the nodes that happen to have connected
            min_available_nodes=num_sites,
            weighted_by_key="num-steps",
        )
        arrays = ArrayRecord(WORKLOADS[workload_name].build_model().state_dict())
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=num_rounds)

    return app


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
