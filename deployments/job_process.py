"""The process of one job at the coordinator: `python -m fedpool.deployments.job_process NAME`.

It runs the flow of that name in `fedpool.flows.entrypoints`, for the flow run that its worker was
given; see `fedpool.deployments.coordinator_worker`.
"""

import os
import sys
from uuid import UUID

from fedpool.flows import entrypoints
from fedpool.loopback import bypass_proxies
from fedpool.tasks.prefect_internals import FLOW_RUN_VARIABLE, run_in_engine


def main() -> None:
    """Run the job, and report the states of its run."""
    bypass_proxies()
    run_in_engine(UUID(os.environ[FLOW_RUN_VARIABLE]), getattr(entrypoints, sys.argv[1]))


if __name__ == "__main__":
    main()
