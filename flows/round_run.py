"""The flow run of a round, inside the process and the flow run of its job.

Prefect's own engine would cost twice as much: for every subflow run, it looks for a run to
continue, names it and reads it back, with a request each. A short round takes about as long as the
server needs for its requests.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from logging import Logger, LoggerAdapter
from uuid import UUID

import httpx
from anyio import CancelScope
from prefect import task
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending, Running

from fedpool.errors import FedpoolError, ServerError
from fedpool.flows.round import federated_round
from fedpool.flows.under_way import Job, RoundSignals
from fedpool.storable import storable
from fedpool.tasks.prefect_internals import client_of, current_tags, run_logger, subflow_context, termination
from fedpool.tasks.run_states import report_state
from fedpool.tasks.watch import gone


@task(name="federated-round")
def _round_in_job() -> None:
    """Represents the round in the job's graph; never called."""


async def run_round(job: Job, number: int) -> None:
    """Create the flow run of a round, named "<job name> round 3", run the round in it, and report
    its end.

    The run is pending until the round's turn comes, so the UI shows when the round started, not
    when the run was created.

    Raises: the round's exception, after reporting the run as failed, as cancelled with its job, or
    as crashed if the process is being ended.
    """
    parent = FlowRunContext.get()
    assert parent is not None and parent.flow_run is not None, "a round runs inside the run of its job"
    client = client_of(parent)
    if (before := job.rounds.get(number - 1)) is not None:
        await before.created.wait()
    try:
        run = await _create(client, parent.flow_run.id, job, number)
    except (httpx.HTTPError, PrefectException) as error:
        raise await why_refused(client, parent.flow_run.id, number, error) from error
    finally:
        job.rounds[number].created.set()
    logger = run_logger(run.id, run.name, federated_round.name)
    starting = asyncio.create_task(_start_at_turn(client, run, job, number, logger))
    with subflow_context(parent, federated_round, run), _noted(job.rounds[number].ended):
        try:
            try:
                ended = await federated_round.fn(job, number) or Completed()
            finally:
                await _settle(starting, job.rounds[number])
        except (asyncio.CancelledError, termination()):
            await _report(client, run, Crashed(message="the coordinator's process was ended"))
            raise
        except Exception as error:
            if job.sites.cancelled:  # not a failure
                await _report(client, run, Cancelled(message="the job was cancelled"))
                raise
            logger.error("%s", error, exc_info=not isinstance(error, FedpoolError))
            await _report(client, run, Failed(message=storable(str(error))))
            raise
        await _report(client, run, ended)


@contextmanager
def _noted(event: asyncio.Event) -> Iterator[None]:
    """Set an event at the end of a block, however it ends."""
    try:
        yield
    finally:
        event.set()


async def _start_at_turn(
    client: PrefectClient, run: FlowRun, job: Job, number: int, logger: "LoggerAdapter[Logger]"
) -> None:
    """Report that a round's run has started once its turn has come, while the round works."""
    if await asyncio.shield(job.rounds[number].step) is None:
        return
    if (before := job.rounds.get(number - 1)) is not None:
        await before.ended.wait()
    try:
        await _report(client, run, Running())
    except (httpx.HTTPError, PrefectException) as error:  # the round continues: only its display suffers
        logger.warning("could not report to the Prefect server that the round has started: %s", error)


async def _settle(starting: "asyncio.Task[None]", signals: RoundSignals) -> None:
    """Make sure that no state of a round's run is reported after its final state."""
    if not signals.step.done():
        starting.cancel()
    await asyncio.wait({starting})
    if not starting.cancelled():
        starting.result()  # raises unexpected errors


async def _create(client: PrefectClient, job_run: UUID, job: Job, number: int) -> FlowRun:
    tracking = await client.create_task_run(
        _round_in_job, job_run, str(number), name=f"federated-round {number}", state=Pending()
    )
    run: FlowRun = await client.create_flow_run(
        federated_round,
        name=f"{job.name} round {number}",
        parameters={"number": number},
        tags=current_tags(),
        parent_task_run_id=tracking.id,
        state=Pending(message="waiting for its turn"),
    )
    return run


async def why_refused(client: PrefectClient, job_run: UUID, number: int, error: Exception) -> ServerError:
    """The error for a round whose run the server didn't accept."""
    try:
        await client.read_flow_run(job_run)
    except ObjectNotFound:
        return ServerError(gone(client, job_run))
    except (httpx.HTTPError, PrefectException):  # no answer, as the error says
        pass
    return ServerError(
        f"round {number} could not start, because the Prefect server at {client.api_url} failed: {error}"
    )


async def _report(client: PrefectClient, run: FlowRun, state: State[None]) -> None:
    with CancelScope(shield=True):
        await report_state(client, state, run.id)
