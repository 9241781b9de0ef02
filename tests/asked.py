"""Shared by the tests of a site's worker: a job whose coordinator is the test, and runs of
deployments.
"""

import asyncio
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from safetensors.numpy import load

from fedpool import FedAvgRecipe, Store
from fedpool.flows.staging import stage
from fedpool.messages import SiteAssignment
from fedpool.paths import JobPaths, new_job_id
from tests.poc import wait_until

# Touches `training`, waits for the file `go`, then sends its process id.
SCRIPT = """
    import os, pathlib, sys, threading
    import numpy as np
    import fedpool.client as flare

    flare.init()
    folder = pathlib.Path(sys.argv[1])
    while flare.is_running():
        model = flare.receive()
        (folder / "training").touch()
        while not (folder / "go").exists():
            threading.Event().wait(0.05)
        flare.send(flare.FLModel(params={"w": np.full(1, os.getpid(), np.float32)}))
    (folder / "ended").touch()
"""


class AskedJob:
    """A staged job coordinated by the test, which asks a site for rounds and reads the results from
    the store.

    Args:
        folder: for the script and the gate.
        site: the job's only site.
        store: the store; default: the folder `store` in `folder`.
        gated: whether training waits for `release()`.
    """

    def __init__(self, folder: Path, site: str, *, store: Path | None = None, gated: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "client.py"
        script.write_text(textwrap.dedent(SCRIPT))
        self.folder = folder
        self.site = site
        self.store = Store(store or folder / "store")
        self.paths = JobPaths(new_job_id("asked"))
        self.recipe = FedAvgRecipe(
            name="asked",
            min_clients=1,
            num_rounds=9,
            model={"w": np.zeros(1, np.float32)},
            train_script=script,
            train_args=[str(folder)],
        )
        stage(self.recipe, self.paths.job_id, self.store, (site,))
        if not gated:
            self.release()

    def release(self) -> None:
        (self.folder / "go").touch()

    def wait_until_training(self) -> None:
        wait_until((self.folder / "training").exists)

    def ask(self, round: int = 0, deployment: str | None = None, named: str | None = None) -> FlowRun:
        """Write the assignment of a round and create its run.

        Args:
            deployment: the run's deployment; default: the site's own.
            named: the store that the run names; default: the job's.
        """
        model = self.recipe.model.digest
        if round > 0:  # every round starts from the same model
            self.store.write_bytes(self.paths.global_model(round), self.store.read_bytes(self.paths.global_model(0)))
        assignment = SiteAssignment(
            site=self.site, round=round, task="train", base_sha256=model.sha256, base_size=model.size, timeout_s=None
        )
        self.store.write_json(self.paths.assignment(round, self.site), assignment.model_dump(mode="json"))
        parameters = {
            "job_id": self.paths.job_id,
            "site": self.site,
            "round": round,
            "attempt": 0,
            "store": named or self.store.url,
        }
        return run_deployment(deployment or f"site-round/{self.site}", parameters)

    def pid(self, round: int = 0) -> float:
        """The process id that the script sent."""
        return float(load(self.store.read_bytes(self.paths.update(round, self.site)))["w"][0])

    def end(self) -> None:
        """End the job, as its coordinator does."""
        self.store.write_json(self.paths.result, {"status": "COMPLETED"})


def run_deployment(name: str, parameters: dict[str, Any], **settings: Any) -> FlowRun:
    async def create() -> FlowRun:
        async with get_client() as client:
            deployment = await client.read_deployment_by_name(name)
            run: FlowRun = await client.create_flow_run_from_deployment(
                deployment.id, parameters=parameters, **settings
            )
            return run

    return asyncio.run(create())


def state_of(run: FlowRun) -> State[Any]:
    async def read() -> State[Any]:
        async with get_client() as client:
            state = (await client.read_flow_run(run.id)).state
            assert state is not None
            return state

    return asyncio.run(read())


def final_state(run: FlowRun, timeout_s: float = 120) -> State[Any]:
    """Wait for a run to end; returns its final state."""
    wait_until(lambda: state_of(run).is_final(), timeout_s=timeout_s)
    return state_of(run)
