"""Engine: a loop in one process, one site after the other: the cost of the work without a
framework.
"""

import time

import torch
from shared import WORKLOADS, job_arguments, stamp


def main() -> None:
    """Run the job."""
    arguments = job_arguments()
    torch.set_num_threads(1)
    workload = WORKLOADS[arguments.workload]
    model = workload.build_model()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for round_number in range(arguments.rounds):
        started_at = time.time()
        total = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        total_steps = 0
        for site in range(arguments.sites):
            model.load_state_dict(weights)
            score = workload.evaluate(model)
            stamp(site, started_at, score)
            num_steps = workload.train(model, site=site, num_sites=arguments.sites, round_number=round_number)
            total_steps += num_steps
            for name, tensor in model.state_dict().items():
                total[name].add_(tensor, alpha=num_steps)
        weights = {name: tensor.div_(total_steps) for name, tensor in total.items()}


if __name__ == "__main__":
    main()
