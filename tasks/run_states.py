"""Reports a run's states to Prefect, without the message if the server can't store it."""

from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State, StateType
from prefect.logging import get_logger

from fedpool.sites.desk import Phase, Report
from fedpool.tasks.prefect_internals import propose

_TYPES = {
    Phase.TAKEN: StateType.PENDING,
    Phase.STARTED: StateType.RUNNING,
    Phase.COMPLETED: StateType.COMPLETED,
    Phase.CANCELLED: StateType.CANCELLED,
    Phase.FAILED: StateType.FAILED,
    Phase.CRASHED: StateType.CRASHED,
}


def state_of(report: Report) -> State[Any]:
    """The Prefect state for a site's report."""
    return State(type=_TYPES[report.phase], message=report.message or None)


async def report_state(client: PrefectClient, state: State[Any], run_id: UUID) -> State[Any] | None:
    """Propose a state of a flow run. If the server refuses it, propose it again without its
    message.

    Returns: the state that the run is in then. None if the server doesn't allow this one, because
    the run has ended or another process has taken it.

    Raises: as `propose`; an `httpx.HTTPStatusError` is that of the first refusal.
    """
    try:
        return await propose(client, state, run_id)
    except httpx.HTTPStatusError as refused:
        status = refused.response.status_code
        message = f"the server refused this state's message (HTTP {status}): see the job's record in the store"
        try:
            answer = await propose(client, state.model_copy(update={"message": message}), run_id)
        except httpx.HTTPStatusError:
            raise refused from None
        get_logger("fedpool").warning(
            "the server refused a state of run %s (HTTP %d): %s", run_id, status, state.message
        )
        return answer
