"""The client app and the server app of the Flower engines."""

import time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from shared import WORKLOADS, stamp


def build_client(workload_name: str, num_sites: int) -> ClientApp:
    """The app that a site runs: score the received model, train it, return it."""
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
            min_train_nodes=num_sites,  # else it samples from the nodes that are already connected
            min_available_nodes=num_sites,
            weighted_by_key="num-steps",
        )
        arrays = ArrayRecord(WORKLOADS[workload_name].build_model().state_dict())
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=num_rounds)

    return app
