"""What a user sees of a job in the Prefect UI, read through the API that the UI itself uses."""

import asyncio
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
)
from prefect.client.schemas.sorting import FlowRunSort

from fedpool import JobFailed, Run

SCRIPT = """
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        print("hello from", flare.get_site_name(), "in round", model.current_round)
        if flare.get_site_name() == "site-2" and model.current_round == {fails_in}:
            raise ValueError("no luck")
        flare.log("loss", 1.5)
        flare.send(flare.FLModel(params=model.params, metrics={{"accuracy": 0.25}}, meta={{"NUM_STEPS_CURRENT_ROUND": 7}}))
"""


async def read(run: Run, *, num_tasks: int = 0) -> dict[str, Any]:
    """The flow runs, task runs, logs and artifacts of a job; waits for its tasks, which the
    server records once a second.
    """
    async with get_client() as client:
        newest = await client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=200)  # the tests share one server
        job = next(r for r in newest if (r.parameters or {}).get("job_id") == run.job_id)
        rounds = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[job.id]))
        )
        rounds.sort(key=lambda r: r.name or "")
        ids = [job.id, *(r.id for r in rounds)]
        of_rounds = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[r.id for r in rounds]))
        tasks = await client.read_task_runs(task_run_filter=of_rounds)
        async with asyncio.timeout(60):
            while sum(task.state is not None and task.state.is_final() for task in tasks) < num_tasks:
                await asyncio.sleep(0.1)
                tasks = await client.read_task_runs(task_run_filter=of_rounds)
        logs = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=ids)), limit=200)
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=ids))
        )
        return {"job": job, "rounds": rounds, "tasks": tasks, "logs": logs, "artifacts": artifacts}


def test_a_job_shows_as_flow_runs_with_logs_tables_and_a_report(run_job: Callable[..., Run]) -> None:
    run = run_job(SCRIPT.format(fails_in=-1), name="seen")
    seen = asyncio.run(read(run, num_tasks=6))
    assert seen["job"].name == "seen" and seen["job"].state_name == "Completed"
    assert seen["job"].parameters["recipe"]["num_rounds"] == 2 and seen["job"].parameters["sites"] == "<LocalSites>"
    assert [r.name for r in seen["rounds"]] == ["seen round 0", "seen round 1", "seen round 2"]
    for before, after in pairwise(seen["rounds"]):  # a round that waits for its turn has not started
        assert before.start_time <= before.end_time <= after.start_time
    assert sorted({task.name for task in seen["tasks"]}) == ["site-1", "site-2"] and len(seen["tasks"]) == 6
    own_logs = {log.message for log in seen["logs"]}
    said = {log.task_run_id for log in seen["logs"] if log.message == "site-2: hello from site-2 in round 1"}
    # During the evaluation that follows, the script still reports its last round.
    assert {t.flow_run_id for t in seen["tasks"] if t.id in said} == {seen["rounds"][1].id, seen["rounds"][2].id}
    assert "site-1: loss = 1.5" in own_logs
    by_key: dict[str, list[Any]] = {}
    for artifact in seen["artifacts"]:
        by_key.setdefault(artifact.key, []).append(artifact)
    assert by_key["progress"][0].data == 100
    table = next(a for a in by_key["round-table"] if a.flow_run_id == seen["rounds"][0].id)
    rows = json.loads(table.data)
    assert rows[0] | {"seconds": ""} == {
        "site": "site-1", "state": "accepted", "examples": "7", "accuracy": "0.2500", "loss": "1.5000", "seconds": "",
        "bytes": str(run.get_result().rounds[0]["accepted"][0]["size"]),
    }  # fmt: skip
    assert "# seen: completed" in by_key["report"][0].data and str(run.get_result().path) in by_key["report"][0].data


def test_scores_across_sites_show_as_a_table_and_a_heat_map(run_job: Callable[..., Run]) -> None:
    run = run_job(SCRIPT.format(fails_in=-1), name="across", cross_site_eval=True)
    seen = {artifact.key: artifact for artifact in asyncio.run(read(run))["artifacts"]}
    assert json.loads(seen["cross-site"].data)[0] == {
        "accuracy": "site-1", "server": "0.2500", "server-best": "0.2500", "site-1": "0.2500", "site-2": "0.2500"
    }  # fmt: skip
    assert seen["cross-site-map"].data.startswith("data:image/svg+xml;base64,")
    assert "| evaluate site-2 |" in seen["report"].data


def test_a_failed_round_says_which_site_which_round_and_the_traceback(run_job: Callable[..., Run]) -> None:
    run = run_job(SCRIPT.format(fails_in=1), name="unlucky")
    with pytest.raises(JobFailed):
        run.get_result()
    seen = asyncio.run(read(run, num_tasks=4))
    assert seen["job"].state_name == "Failed"
    failed = seen["rounds"][1]
    assert failed.name == "unlucky round 1" and failed.state_name == "Failed"
    for words in ("round 1", "site-2 failed", "Traceback (most recent call last)", "ValueError: no luck"):
        assert words in failed.state.message
    states = {task.name: task.state_name for task in seen["tasks"] if task.flow_run_id == failed.id}
    assert states == {"site-1": "Completed", "site-2": "Failed"}
    assert any(a.key == "report" and "ValueError: no luck" in a.data for a in seen["artifacts"])


def test_an_aborted_job_shows_as_cancelled_and_so_do_its_rounds(run_job: Callable[..., Run], tmp_path: Path) -> None:
    training = tmp_path / "training"
    script = f"""
        import pathlib
        import threading
        import fedpool.client as flare
        flare.init()
        flare.receive()
        pathlib.Path({str(training)!r}).touch()
        threading.Event().wait()
    """
    run = run_job(script, wait=False, model={"w": np.zeros(1)})
    while not training.exists():
        assert not run.wait(0.05)
    run.abort()
    assert run.wait(300)
    seen = asyncio.run(read(run))
    assert seen["job"].state_name == "Cancelled"
    assert [r.state_name for r in seen["rounds"]] == ["Cancelled", "Cancelled"]  # one trained, one was announced ahead
