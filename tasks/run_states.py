"""Reporting the state of a run to Prefect, so that no state is lost because the server cannot
store what it says.
"""

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
    """The state that a site's report stands for."""
    return State(type=_TYPES[report.phase], message=report.message or None)


async def report_state(client: PrefectClient, state: State[Any], run_id: UUID) -> State[Any] | None:
    """Propose a state of a flow run; one that the server refuses is proposed once more, without its
    message.

    Returns: the state that the run is in then; None when the server does not allow this one,
    because the run has ended, or is
        somebody else's.

    Raises: as `propose`; an `httpx.HTTPStatusError` is that of the first refusal.
    """
    try:
        return await propose(client, state, run_id)
    except httpx.HTTPStatusError as refused:
        status = refused.response.status_code
        message = f"the server refused the message of this state (HTTP {status}): the job's record in the store has it"
        try:
            answer = await propose(client, state.model_copy(update={"message": message}), run_id)
        except httpx.HTTPStatusError:
            raise refused from None
        get_logger("fedpool").warning(
            "the server refused a state of run %s (HTTP %d): %s", run_id, status, state.message
        )
        return answer
