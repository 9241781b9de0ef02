"""Every public call works where an event loop is already running: in a notebook, an async function
or an async flow.
"""

import asyncio
import contextvars
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from prefect import flow

from fedpool import JobStatus, Run
from fedpool.deployments.blocking import run_blocking
from tests.poc import GATED

WHO = contextvars.ContextVar("who", default="nobody")


async def _who() -> tuple[str, threading.Thread]:
    return WHO.get(), threading.current_thread()


def test_without_a_loop_a_coroutine_runs_here() -> None:
    WHO.set("me")
    assert run_blocking(_who()) == ("me", threading.current_thread())


def test_where_a_loop_runs_a_coroutine_has_the_callers_context_and_a_thread_of_its_own() -> None:
    async def call() -> tuple[str, threading.Thread]:
        WHO.set("me")
        return run_blocking(_who())

    who, thread = asyncio.run(call())
    assert who == "me" and thread is not threading.current_thread() and not thread.is_alive()


def test_what_a_coroutine_raises_is_raised_in_the_caller() -> None:
    async def fail() -> None:
        raise ValueError("my own error")

    async def call() -> None:
        run_blocking(fail())

    with pytest.raises(ValueError, match="my own error"):
        asyncio.run(call())


def notebook(folder: Path, *cells: str) -> list[str]:
    """Run a notebook's cells in a real kernel; returns what each prints. Raises if one raises."""
    code = [nbformat.v4.new_code_cell(textwrap.dedent(cell)) for cell in cells]  # type: ignore[no-untyped-call]
    made = nbformat.v4.new_notebook(cells=code)  # type: ignore[no-untyped-call]
    NotebookClient(made, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return ["".join(_text(output) for output in cell.outputs) for cell in made.cells]


def _text(output: Any) -> str:
    text: str = output.get("text") or output.get("data", {}).get("text/plain", "")
    return text


RECIPE = """
    import asyncio
    import numpy as np
    from fedpool import FedAvgRecipe, JobCancelled, JobStatus, PocEnv, SimEnv
    from fedpool.cli import main

    asyncio.get_running_loop()  # a kernel has one

    def recipe(**config):
        config = {"folder": ".", "hold": []} | config
        return FedAvgRecipe(name="cells", min_clients=2, num_rounds=2, model={"w": np.zeros(3)}, train_script="client.py",
                            per_site_config={"site-1": config, "site-2": config})
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "client.py").write_text(textwrap.dedent(GATED))
    return tmp_path


def test_a_simulation_in_a_notebook(prefect_api: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    *_, printed = notebook(
        folder,
        RECIPE,
        """
        run = recipe().execute(SimEnv(num_clients=2))
        assert run.get_result().params["w"].tolist() == [2, 2, 2]
        """,
        """
        run = recipe(hold=[0]).execute(SimEnv(num_clients=2), wait=False)
        assert run.get_status() is JobStatus.RUNNING and not run.wait(0.1)
        run.abort()
        try:
            run.get_result()
        except JobCancelled as error:
            print(error)
        again = recipe(hold=[0]).execute(SimEnv(num_clients=2), resume=run.job_id, wait=False)
        again.abort()
        assert again.wait(300) and again.get_status() is JobStatus.CANCELLED
        """,
        """
        try:
            main(["job", "list"])
        except SystemExit as end:
            assert not end.code
        """,
    )
    assert "cells-" in printed and "COMPLETED" in printed


@pytest.mark.slow
def test_a_proof_of_concept_in_a_notebook(folder: Path) -> None:
    """Everything: up, execute, status, abort, deploy, the commands, down."""
    try:
        *_, deployed, printed, _ = notebook(
            folder,
            RECIPE,
            'env = PocEnv(num_clients=2, home="home")',
            "assert recipe().execute(env).get_result().params['w'].tolist() == [2, 2, 2]",
            """
            run = recipe(hold=[0]).execute(env, wait=False)
            assert run.get_status() is JobStatus.RUNNING
            run.abort()
            try:
                run.get_result(120)
            except JobCancelled:
                assert run.get_status() is JobStatus.CANCELLED
            assert run.get_progress().num_committed == 0
            """,
            "print(recipe().deploy(env, schedule='0 2 * * 0'))",
            """
            run = recipe(hold=[0]).execute(env, wait=False)
            for command in (["job", "cancel", run.job_id], ["job", "logs", run.job_id], ["poc", "status"], ["job", "list"]):
                try:
                    main([*command, "--home", "home"])
                except SystemExit as end:
                    assert not end.code, command
            assert run.wait(300) and run.get_status() is JobStatus.CANCELLED
            """,
            "env.down()",
        )
    finally:
        from fedpool import PocEnv

        PocEnv(home=folder / "home").down()
    assert deployed == "federated-job/cells\n"
    assert "coordinator" in printed and "cells-" in printed


def test_a_simulation_in_an_async_function(run_job: Callable[..., Run]) -> None:
    async def main() -> JobStatus:
        run = run_job()
        aborted = run_job(wait=False)
        aborted.abort()
        assert aborted.wait(300)
        return run.get_status()

    assert asyncio.run(main()) is JobStatus.COMPLETED


@pytest.mark.parametrize("in_flow", ["async", "sync"])
def test_a_simulation_in_a_flow_of_ones_own(in_flow: str, run_job: Callable[..., Run]) -> None:
    def body() -> list[float]:
        params: dict[str, Any] = run_job().get_result().params
        return [float(value) for value in params["w"]]

    if in_flow == "async":

        @flow
        async def mine() -> list[float]:
            return body()

        assert asyncio.run(mine()) == [2, 2, 2]
    else:

        @flow
        def mine_too() -> list[float]:
            return body()

        assert mine_too() == [2, 2, 2]
