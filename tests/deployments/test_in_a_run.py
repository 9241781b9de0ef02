"""A simulation inside your own Prefect run joins that run's server, whether it is configured or
started by Prefect.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import ADD_ONE
from tests.poc import reaching

JOB = """
    import asyncio
    import sys
    import numpy as np
    from prefect import flow, task
    from prefect.client.orchestration import get_client
    from fedpool import FedAvgRecipe, SimEnv

    def job(name):
        recipe = FedAvgRecipe(name=name, min_clients=1, num_rounds=2, model={"w": np.zeros(3)}, train_script="client.py")
        result = recipe.execute(SimEnv(progress=False)).get_result()
        assert result.params["w"].tolist() == [2, 2, 2]
        return name

    @flow
    def in_flow():
        return job("in-flow")

    @flow
    async def in_async_flow():
        return job("in-async-flow")

    @task
    def in_task(name):
        return job(name)

    @task
    async def in_async_task():
        return job("in-async-task")

    @flow
    def in_subflow():
        return job("in-subflow")

    @flow
    def around():
        return in_task("in-task"), in_task.submit("in-thread").result(), in_subflow()

    @flow
    async def around_async():
        return await in_async_task()

    done = [asyncio.run(in_async_flow()), in_task("in-lone-task")]
    if sys.argv[1:] == ["all"]:
        done += [in_flow(), *around(), asyncio.run(around_async())]

    async def read():
        async with get_client() as client:
            return {run.name: run for run in await client.read_flow_runs()}

    runs = asyncio.run(read())
    for name in done:
        assert runs[name].state.is_completed(), (name, runs[name].state)
        assert runs[f"{name} round 1"].state.is_completed()
        assert (runs[name].parent_task_run_id is None) == (name == "in-lone-task"), name
    print("joined:", *sorted(done))
"""


FEW = "in-async-flow in-lone-task"
ALL = "in-async-flow in-async-task in-flow in-lone-task in-subflow in-task in-thread"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("server", "which"),
    [
        ("prefect's own", "few"),
        pytest.param("prefect's own", "all", marks=pytest.mark.slow),
        pytest.param("configured", "all", marks=pytest.mark.slow),
    ],
)
def test_a_job_joins_the_run_around_it(server: str, which: str, prefect_api: str, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(textwrap.dedent(ADD_ONE))
    (tmp_path / "job.py").write_text(textwrap.dedent(JOB))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    environment |= {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    }
    if server == "configured":
        environment |= reaching(prefect_api)
    done = subprocess.run(
        [sys.executable, "job.py", which],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert f"joined: {ALL if which == 'all' else FEW}\n" in done.stdout
    assert "Prefect UI during the run" not in done.stdout
