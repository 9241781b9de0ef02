"""Reporting the state of a run to Prefect, so that no state is lost because the server cannot store what it says."""

from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State
from prefect.logging import get_logger
from prefect.utilities.engine import propose_state


async def report_state(client: PrefectClient, state: State[Any], run_id: UUID) -> State[Any]:
    """Propose a state of a flow run; one that the server refuses is proposed once more, without its message.

    Returns: the server's answer.

    Raises: as `prefect.utilities.engine.propose_state`; an `httpx.HTTPStatusError` is that of the first refusal.
    """
    try:
        return await propose_state(client, state, flow_run_id=run_id)
    except httpx.HTTPStatusError as refused:
        status = refused.response.status_code
        message = f"the server refused the message of this state (HTTP {status}): the job's record in the store has it"
        try:
            answer: State[Any] = await propose_state(
                client, state.model_copy(update={"message": message}), flow_run_id=run_id
            )
        except httpx.HTTPStatusError:
            raise refused from None
        get_logger("fedpool").warning(
            "the server refused a state of run %s (HTTP %d): %s", run_id, status, state.message
        )
        return answer
