"""Overlapping runs of a deployment: the part that a run itself has to handle.

Prefect decides before a run starts, by the deployment's concurrency limit, whether the run waits
for the previous one or is skipped. Prefect can't have a run end the previous one, so this module
does.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import anyio
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.states import Cancelling, Completed

from fedpool.flows.staging import has_completed
from fedpool.patience import pauses
from fedpool.store import Store

T = TypeVar("T")

_POLL_S = 1.0
_PATIENCE_S = 120.0
"""How long a cancelled run may take to end; if its machine is gone, it never does."""


async def cancel_earlier() -> None:
    """Cancel earlier runs of this run's deployment, and wait for them to end."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.deployment_id is None:
        return
    logger = get_run_logger()
    async with get_client() as client:
        earlier = await _under_way_before(client, run)
        for other in earlier:
            logger.info("cancelling run %s, which this one replaces", other.name)
            if other.state is not None and not other.state.is_cancelling():
                await client.set_flow_run_state(other.id, Cancelling(message=f"replaced by run {run.name}"))
        for pause_s in pauses(_PATIENCE_S, _POLL_S):
            if not (earlier := await _under_way_before(client, run)):
                return
            await asyncio.sleep(pause_s)
    for other in earlier:
        logger.warning(
            "run %s did not end within %g s: starting anyway. If the machine that ran it is gone: prefect flow-run delete %s",
            other.name,
            _PATIENCE_S,
            other.id,
        )


async def _under_way_before(client: PrefectClient, run: FlowRun) -> list[FlowRun]:
    """Unfinished runs of the same deployment that were due before a run; ties are broken by id."""
    states = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    found = await client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[run.deployment_id])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))),
    )
    mine = _due(run)
    return [other for other in found if other.id != run.id and _due(other) < mine]


def _due(run: FlowRun) -> tuple[float, str]:
    due = run.expected_start_time or run.created
    return (due.timestamp() if due else 0.0, str(run.id))


async def outlasting_its_slot(work: Awaitable[T]) -> T:
    """Do some work to its end, even if Prefect cancels its run for losing the deployment's slot.

    A run holds its slot through a lease, which Prefect renews. If that fails because the server was
    restarted or didn't answer for some seconds, Prefect cancels the run. Finishing the job is worth
    the risk that two of them overlap.
    """
    # Shields from Prefect's scope only: a cancelled task or a signal still ends the work.
    with anyio.CancelScope(shield=True):
        result = await work
    return result  # noqa: RET504  # mypy thinks that a scope may swallow exceptions


async def believe_the_store(client: PrefectClient, run: FlowRun) -> None:
    """If the job of a crashed run has completed, mark the run as completed too."""
    store = Store(str(run.parameters["store"]))
    if await asyncio.to_thread(has_completed, store, run.name):
        completed: State[Any] = Completed(message=f"job {run.name} has completed")
        await client.set_flow_run_state(run.id, completed, force=True)
